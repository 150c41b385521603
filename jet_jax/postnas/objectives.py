"""What a search looks at: rows, one figure of them, and the gate that the teacher must pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jet_jax.evaluation import harness
from jet_jax.evaluation.rows import Rows
from jet_jax.evaluation.scoring import EDGES, summarise_buckets
from jet_jax.models.lm import HybridLM

# Figure -> whether more is better. Figures by position are written "kl@512-2047".
FIGURES = {
    "accuracy": True,
    "accuracy_norm": True,
    "loss": False,
    "choice_loss": False,
    "nll": False,
    "kl": False,
    "agree": True,
}
OF_TOKENS, OF_CHOICES = ("nll", "kl", "agree"), ("accuracy_norm", "choice_loss")
OF_TEACHER = ("kl", "agree")  # that compare with the teacher
PER_QUESTION = {"accuracy": "correct", "accuracy_norm": "correct_norm"}


@dataclass(frozen=True, eq=False)
class Objective:
    """One thing to search by.

    Attributes:
      name: for tables and files.
      rows: the items, of the split "search".
      figure: of `FIGURES`; `accuracy`, `accuracy_norm`, `loss` and `choice_loss` are a question's,
        `nll`, `kl` and `agree` a token's, the latter two against the teacher. A token's may name
        positions, a bucket of `evaluation.scoring` that the rows have tokens in: `kl@512-2047`.
      gate: what the teacher must reach in `figure` (at least, or at most where less is better) for
        the task to say anything; None for no gate. KL has none: the teacher's is 0.

    Raises:
      ValueError: for a figure that is unknown or that the rows cannot give, or no items.
    """

    name: str
    rows: Rows
    figure: str
    gate: float | None = None

    def __post_init__(self) -> None:
        figure, at, _ = self.figure.partition("@")
        if figure not in FIGURES or (at and figure not in OF_TOKENS):
            raise ValueError(
                f"objective {self.name}: figure {self.figure!r} is unknown; use one of "
                f"{', '.join(FIGURES)}, and of {', '.join(OF_TOKENS)} also with positions, as in "
                "kl@512-2047"
            )
        if figure in OF_CHOICES and not self.rows.has_choices:
            raise ValueError(
                f"objective {self.name}: {figure} is a figure of questions with choices, and "
                f"{self.rows.name} asks for free answers"
            )
        if self.rows.num_items == 0:
            raise ValueError(f"objective {self.name}: there are no items; give it data")
        if at:
            self._check_positions()

    def _check_positions(self) -> None:
        figure, _, where = self.figure.partition("@")
        known, filled = _buckets(np.ones(len(EDGES) + 1)), _buckets(_tokens_by_bucket(self.rows))
        if where not in known:
            raise ValueError(
                f"objective {self.name}: figure {self.figure!r} names no known positions; use one "
                f"of {', '.join(f'{figure}@{name}' for name in known)}"
            )
        if where not in filled:
            raise ValueError(
                f"objective {self.name}: figure {self.figure!r} has nothing to score, as rows of "
                f"{self.rows.tokens.shape[1]} tokens hold answers at {', '.join(filled)} only; "
                "name positions among these, or give it longer rows"
            )

    @property
    def more_is_better(self) -> bool:
        """Whether a higher figure is a better one."""
        return FIGURES[self.figure.partition("@")[0]]

    def evaluate(self, model: HybridLM, teacher: HybridLM, batch_size: int) -> dict[str, Any]:
        """What `harness.evaluate` gives of a model, beside the teacher where the figure needs it.

        Args:
          model: on the mesh that is set.
          teacher: over the same vocabulary.
          batch_size: rows at a time.
        """
        beside = teacher if self.figure.partition("@")[0] in OF_TEACHER else None
        return harness.evaluate(model, self.rows, batch_size, beside)

    def value(self, results: Mapping[str, Any]) -> float:
        """The figure among the results of one path.

        Args:
          results: what `summarise` gives, with `buckets`.
        """
        figure, _, where = self.figure.partition("@")
        if figure in OF_TOKENS:
            return float(results["buckets"][where or "all"][figure])
        return float(results[figure])

    def score(self, results: Mapping[str, Any]) -> float:
        """The figure with the sign that makes more better."""
        value = self.value(results)
        return value if self.more_is_better else -value

    def questions(self, results: Mapping[str, Any]) -> np.ndarray | None:
        """Scores question by question, for paired errors; None for a token's figure."""
        per_question = results["per_question"]
        name = PER_QUESTION.get(self.figure, self.figure)
        if name not in per_question:
            return None
        values = np.asarray(per_question[name], np.float64)
        return values if self.more_is_better else -values

    def check_gate(self, teacher: Mapping[str, Any]) -> None:
        """Raises ValueError if the teacher's figure does not pass the gate."""
        if self.gate is None:
            return
        value = self.value(teacher)
        if (value < self.gate) if self.more_is_better else (value > self.gate):
            wanted = "at least" if self.more_is_better else "at most"
            raise ValueError(
                f"objective {self.name}: the teacher's {self.figure} is {value:.3f} and should be "
                f"{wanted} {self.gate:g}, else the task says nothing about its layers; make it "
                "easier, or search by another objective"
            )


def check_objectives(objectives: Sequence[Objective]) -> None:
    """Raises ValueError for no objective, or two of one name."""
    names = [objective.name for objective in objectives]
    if not names:
        raise ValueError("there is no objective to search by; name at least one")
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"two objectives are called {double[0]!r}; names are to differ")


def _tokens_by_bucket(rows: Rows) -> np.ndarray:
    """The number of tokens that are scored in each bucket of positions."""
    bucket = np.searchsorted(EDGES, rows.positions[rows.answers != 0], side="right")
    return np.bincount(bucket, minlength=len(EDGES) + 1)


def _buckets(tokens: np.ndarray) -> list[str]:
    """The names of the buckets that have tokens."""
    return [name for name in summarise_buckets({"tokens": tokens}) if name != "all"]
