"""One task for a model and those beside it: figures, intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from jet_jax.evaluation import harness, statistics
from jet_jax.evaluation.rows import Rows
from jet_jax.models.lm import HybridLM

SAMPLES = 2000  # of the bootstrap
ARRAYS = ("per_item", "per_question")  # what `harness.evaluate` gives beside figures


def texts_of(rows: Rows) -> np.ndarray:
    """The text [questions] that each question stands in, from 0: what intervals resample.

    The questions of one text are not independent. A choice question is a text of its own.
    """
    if rows.has_choices:
        return np.arange(len(np.unique(rows.groups)))
    at = np.nonzero(rows.answers)
    place = np.zeros(rows.num_items, np.int64)
    place[rows.answers[at] - 1] = at[0] * (rows.tokens.shape[1] + 1) + rows.segment_ids[at]
    return np.unique(place[np.argsort(rows.groups)], return_inverse=True)[1]


def compare(
    models: Mapping[str, HybridLM],
    rows: Rows,
    measure: Literal["accuracy", "nll"],
    batch_size: int = 8,
    on_model: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Scores models on the same rows.

    Args:
      models: the first is the one in question. One named "teacher" also gives the first one's
        `kl` and `agreement`.
      rows: the set.
      measure: "accuracy", or "nll": nats a token.
      batch_size: rows at a time.
      on_model: called with a model's name when it begins.

    Returns:
      Sizes of the set; `models`: for each name `value`, `low` and `high` (the measure and its
      95 % interval over texts), the figures of `harness.evaluate` and `per_question`, its arrays
      as lists; `differences`: for each further model the first one's value minus its own with the
      interval of the paired difference, and for accuracy McNemar's counts and p-value, and
      `loss`, the same difference of the loss.
    """
    unit = texts_of(rows)
    sums: dict[str, np.ndarray] = {}
    loss: dict[str, np.ndarray] = {}
    out: dict[str, Any] = {
        "measure": measure,
        "length": rows.tokens.shape[1],
        "rows": len(rows.tokens),
        "questions": len(unit),
        "texts": int(unit.max()) + 1,
        "models": {},
        "differences": {},
    }
    first, correct = next(iter(models)), {}
    for name, model in models.items():
        on_model(name)
        teacher = models.get("teacher") if name == first else None
        result = harness.evaluate(model, rows, batch_size, teacher)
        correct[name] = result["per_question"]["correct"]
        if measure == "nll":
            values, weights = -result["per_item"]["logprob"], result["per_item"]["tokens"]
        else:
            values, weights = correct[name], np.ones(len(unit))
        sums[name], weight = np.bincount(unit, values), np.bincount(unit, weights)
        loss[name] = np.bincount(unit, result["per_question"]["loss"])
        interval = statistics.bootstrap(sums[name], weight, samples=SAMPLES)
        out["models"][name] = {
            **_named(interval),
            **{key: value for key, value in result.items() if key not in ARRAYS},
            "per_question": {key: x.tolist() for key, x in result["per_question"].items()},
        }
        if name == first:
            continue
        interval = statistics.bootstrap_difference(sums[first], sums[name], weight, samples=SAMPLES)
        out["differences"][name] = _named(interval)
        if measure == "accuracy":
            test = statistics.mcnemar(correct[first], correct[name])
            out["differences"][name] |= test._asdict()
            interval = statistics.bootstrap_difference(
                loss[first], loss[name], weight, samples=SAMPLES
            )
            out["differences"][name]["loss"] = _named(interval)
    return out


def free_running(
    model: HybridLM,
    teacher: HybridLM,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Any]:
    """`harness.free_running` with 95 % intervals over prompts.

    Returns:
      `agreed`: greedy tokens before the model leaves the teacher's text; `excess_nll`: nats a
      token by which the teacher finds the model's samples less likely than its own. Each is
      [mean, low, high]. `prompts` and `new_tokens`: their numbers; `per_prompt`: lists.
    """
    key = jax.random.key(seed)
    result = harness.free_running(
        model, teacher, prompts, new_tokens, key=key, batch_size=batch_size
    )["per_prompt"]
    figures = {
        "agreed": result["agreed"],
        "excess_nll": result["student_nll"] - result["teacher_nll"],
    }
    return {
        **{name: list(statistics.bootstrap(x, samples=SAMPLES)) for name, x in figures.items()},
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "per_prompt": {name: x.tolist() for name, x in result.items()},
    }


def _named(interval: statistics.Interval) -> dict[str, float]:
    return dict(zip(("value", "low", "high"), interval, strict=True))


def perplexity(nll: float) -> float:
    """e to the nats a token; infinity where that is too large."""
    return math.exp(nll) if nll < 700 else math.inf
