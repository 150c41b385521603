"""What all arms of a comparison share: teacher, placement, text, and what they are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jet_jax.data import DataConfig
from jet_jax.distill import Teacher
from jet_jax.models.lm import HybridLM
from jet_jax.postnas.objectives import Objective


@dataclass(frozen=True, eq=False)
class ComparisonContext:
    """What all arms of a comparison share.

    Attributes:
      teacher: the model that is converted.
      path: int [L], of `paths.FULL`, `LINEAR` and `WINDOW`: the placement.
      data: what is trained on.
      mesh: device mesh; the teacher's weights lie on it.
      objectives: what arms are judged by, of the split "search".
      tuning: what learning rates are chosen by, of the split "tuning".
      window: tokens that the windowed layers see; None takes the teacher's own.
      batch_size: rows that are judged at a time.
      log_every: steps between records.
      checkpoint_every: steps between checkpoints; 0 for none but the last.
      measurements: folder of measured speeds, which searches may share; None takes one in the
        comparison's own folder.
    """

    teacher: Teacher
    path: Sequence[int]
    data: DataConfig
    mesh: Mesh
    objectives: Sequence[Objective]
    tuning: Objective
    window: int | None = None
    batch_size: int = 8
    log_every: int = 10
    checkpoint_every: int = 0
    measurements: Path | None = None

    def score(self, model: HybridLM, objective: Objective) -> dict[str, Any]:
        """What `Objective.evaluate` gives."""
        with jax.set_mesh(self.mesh):
            return objective.evaluate(model, self.reader, self.batch_size)

    def figures(self, model: HybridLM, objectives: Sequence[Objective]) -> dict[str, float]:
        """A model's figures by objective."""
        return {o.name: o.value(self.score(model, o)) for o in objectives}

    @property
    def reader(self) -> HybridLM:
        """The teacher as a model."""
        return nnx.merge(self.teacher.graphdef, self.teacher.params)
