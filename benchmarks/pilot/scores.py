"""What trained linear paths score in fixed placements."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import jax
import numpy as np

from benchmarks.pilot.material import Material
from jet_jax.evaluation.rows import Rows
from jet_jax.postnas import selectors, supernet
from jet_jax.postnas.objectives import Objective
from jet_jax.postnas.path_scores import PathScorer
from jet_jax.postnas.paths import path_of


class Scores:
    """Scores weights of the first kind by held-out text and retrieval, in one program.

    Args:
      material: the teacher and the text.
      retrieval: name -> rows.
    """

    def __init__(self, material: Material, retrieval: dict[str, Rows]):
        self.material, self.retrieval = material, retrieval
        self.net = material.nets["gla"]

    @property
    def placements(self) -> dict[str, np.ndarray]:
        """The fixed paths that arms are scored on, and the teacher's own."""
        path = self.net.teacher_path
        even = selectors.uniform(len(path), 2)
        return {
            "teacher": path,
            "all linear": path_of(path, ()),
            f"uniform {even[0]}, {even[1]}": path_of(path, even),
            "first two": path_of(path, (0, 1)),
        }

    @cached_property
    def scorer(self) -> PathScorer:
        """The scorer, its weights to be replaced."""
        objectives = [Objective("text", self.material.text(self.material.sizes.text_rows), "kl")]
        objectives += [Objective(name, rows, "accuracy") for name, rows in self.retrieval.items()]
        params = self._params(self.material.start("gla", "random", 0), None)
        chunk = len(self.placements)
        return PathScorer(self.net, params, objectives, self.material.mesh, chunk=chunk)

    def _params(self, linear: Any, full: Any) -> dict[str, Any]:
        """All weights; attention that has been trained in the teacher's dtype, as it computes."""
        own = self.material.teacher["layers"]["mixer"]
        full = own if full is None else jax.tree.map(lambda x, y: x.astype(y.dtype), full, own)
        params = {"teacher": self.material.teacher, "linear": linear, "full": full}
        return jax.device_put(params, supernet.shardings(params, self.material.mesh))

    def __call__(self, linear: Any, full: Any = None) -> dict[str, Any]:
        """Scores of `placements`: KL by position, perplexity over the teacher's, accuracies."""
        scorer = self.scorer
        scorer.params, scorer.known = self._params(linear, full), {}
        results = scorer(self.placements.values())
        out = {}
        for name, path in self.placements.items():
            found = results[tuple(path.tolist())]
            buckets = found["text"]["buckets"]
            gap = buckets["all"]["nll"] - buckets["all"]["teacher_nll"]
            out[name] = {
                "kl": {bucket: plain(x["kl"]) for bucket, x in buckets.items()},
                "perplexity_ratio": plain(np.exp(gap)),
                "accuracy": {task: found[task]["accuracy"] for task in self.retrieval},
            }
        return out


def plain(x: Any) -> float | None:
    """A number as JSON knows it; None for what is none."""
    return float(x) if np.isfinite(x) else None
