"""The settings of a placement: what to search by, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jet_jax.mixer_options import build
from jet_jax.postnas.objectives import FIGURES

SELECTORS = ("beam", "single", "kl_greedy", "halo_ratio", "uniform", "random", "given")


@dataclass(frozen=True)
class ObjectiveConfig:
    """One objective.

    Attributes:
      task: a name of `jet_jax.evaluation.tasks`, or a .jsonl file.
      figure: what of it counts, see `objectives.FIGURES`; `kl@512-2047` names positions.
      gate: what the teacher must reach; None for none.
      length: tokens of a row; None takes the task's own.
      num_items: texts or questions; None takes the task's own number.
      documents: files of text that the task needs or fills its rows with.
      seed: of generated texts.
    """

    task: str
    figure: str = "accuracy"
    gate: float | None = None
    length: int | None = None
    num_items: int | None = None
    documents: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "documents", tuple(self.documents))
        if self.figure.partition("@")[0] not in FIGURES:
            raise ValueError(
                f"figure {self.figure!r} of task {self.task!r} is unknown; use {', '.join(FIGURES)}"
            )


@dataclass(frozen=True)
class PlacementConfig:
    """Where attention stays.

    Attributes:
      objectives: name -> `ObjectiveConfig`.
      full: full-attention layers to place; `full_by` names the objective.
      full_by: may be left out where there is one objective.
      windows: sliding-window layers to place on the rest; `window_by` names the objective.
      window_by: may be left out where there is one objective, or no window.
      window: tokens that they see; None takes the teacher's own.
      selector: of `SELECTORS`.
      beam_width: sets that a beam keeps.
      offset: of `uniform`.
      seed: of `random`.
      layers: of `given`.
      general: objective that `halo_ratio` weighs against.
      curve: numbers of full layers for the learned-against-uniform curve.
      batch_size: rows at a time.
      chunk: candidates a call.
    """

    objectives: Any
    full: int = 2
    full_by: str = ""
    windows: int = 0
    window_by: str = ""
    window: int | None = None
    selector: str = "beam"
    beam_width: int = 8
    offset: int = 0
    seed: int = 0
    layers: tuple[int, ...] = ()
    general: str = ""
    curve: tuple[int, ...] = ()
    batch_size: int = 8
    chunk: int = 16

    def __post_init__(self) -> None:
        named = {
            name: x if isinstance(x, ObjectiveConfig)
            else build(ObjectiveConfig, dict(x), f"placement.objectives.{name}")
            for name, x in dict(self.objectives).items()
        }  # fmt: skip
        if not named:
            raise ValueError("placement.objectives is empty; name at least one")
        object.__setattr__(self, "objectives", named)
        for name in ("layers", "curve"):
            object.__setattr__(self, name, tuple(int(x) for x in getattr(self, name)))
        if self.selector not in SELECTORS:
            raise ValueError(
                f"placement.selector={self.selector!r} is unknown; use {', '.join(SELECTORS)}"
            )
        least = {"full": 0, "windows": 0, "batch_size": 1, "chunk": 1, "beam_width": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"placement.{name}={getattr(self, name)} must be at least {low}")
        only = next(iter(named)) if len(named) == 1 else ""
        for setting in ("full_by", "window_by"):
            object.__setattr__(self, setting, getattr(self, setting) or only)
        asked = {"full_by": self.full_by}
        if self.windows:
            asked["window_by"] = self.window_by
        if self.selector == "halo_ratio":
            asked["general"] = self.general
        for setting, name in asked.items():
            if name not in named:
                raise ValueError(
                    f"placement.{setting}={name!r} is no objective; there are {', '.join(named)}"
                )
