"""Where attention stays: full-attention layers first, then windowed ones on the rest.

    heat map        each layer alone keeps its attention, all others linear
    full layers     the selector's choice for k layers, by the objective named
    windows         the same on the remaining layers, under a sliding-window mask
    curve           the choice for several k, beside uniform placements at every offset

Everything that was scored is in the table that is written, path by path.

Source: arXiv 2508.15884 §2.2, figure 5; retrieval places full attention and multiple choice the
windows there (§3.1), here the objectives that the config names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jet_jax.evaluation.statistics import bootstrap
from jet_jax.postnas import selectors
from jet_jax.postnas.path_scores import PathScorer
from jet_jax.postnas.paths import LINEAR, path_of
from jet_jax.postnas.placement_config import PlacementConfig
from jet_jax.postnas.selectors import Beam, Layers


@dataclass(frozen=True)
class Placement:
    """Places layers by the scores of a scorer.

    Attributes:
      config: what to place and how.
      scorer: scores paths.
    """

    config: PlacementConfig
    scorer: PathScorer

    @property
    def teacher(self) -> np.ndarray:
        """The teacher's own path."""
        return self.scorer.net.teacher_path

    def check(self) -> None:
        """Raises ValueError for layers that do not exist or cannot be had, before any scoring."""
        layers, c = self.scorer.net.num_layers, self.config
        if c.full + c.windows > layers:
            raise ValueError(
                f"placement.full={c.full} and windows={c.windows} layers, but the teacher has "
                f"{layers}"
            )
        if c.selector == "given":
            path_of(self.teacher, c.layers)
            if len(c.layers) != c.full:
                raise ValueError(
                    f"placement.layers names {len(c.layers)} layers, but placement.full={c.full}"
                )
        if c.curve and c.selector in ("given", "uniform", "random"):
            raise ValueError(
                f"placement.curve compares what is searched with uniform placements; the selector "
                f"{c.selector!r} searches nothing, so leave it empty"
            )
        if c.selector == "uniform":
            selectors.uniform(layers, c.full, c.offset)
        if c.windows and not self.scorer.net.has_window:
            raise ValueError("placement.windows needs placement.window, the tokens that they see")
        for k in c.curve:
            selectors.check_count(range(layers), k)

    def sets(self, objective: str, window_on: Layers | None = None) -> selectors.ScoreSets:
        """A function that scores layer sets by an objective, more being better.

        Args:
          objective: its name.
          window_on: None scores sets of full layers; else these layers are full and the sets are
            windowed.
        """
        judge = self.scorer.objective(objective)

        def score(sets: Iterable[Layers]) -> dict[Layers, float]:
            sets = [tuple(s) for s in sets]
            paths = [self.path(s, window_on) for s in sets]
            known = self.scorer(paths)
            return {
                s: self._finite(
                    judge.score(known[tuple(path.tolist())][objective]), path, objective
                )
                for s, path in zip(sets, paths, strict=True)
            }

        return score

    @staticmethod
    def _finite(score: float, path: np.ndarray, objective: str) -> float:
        if not math.isfinite(score):
            raise FloatingPointError(f"objective {objective} is {score} on path {path.tolist()}")
        return score

    def path(self, layers: Layers, window_on: Layers | None = None) -> np.ndarray:
        """The path of a set as `sets` scores it."""
        if window_on is None:
            return path_of(self.teacher, layers)
        return path_of(self.teacher, window_on, layers)

    def select(self, k: int, objective: str, window_on: Layers | None = None) -> Layers:
        """The selector's choice of k layers."""
        c, layers = self.config, self.scorer.net.num_layers
        free = [x for x in range(layers) if x not in (window_on or ())]
        score = self.sets(objective, window_on)
        if c.selector == "given" and window_on is None:
            return tuple(sorted(c.layers))
        choose = {
            "single": selectors.single,
            "kl_greedy": selectors.greedy,
            "random": lambda free, k, score: selectors.random_layers(free, k, c.seed),
            "halo_ratio": partial(_halo, self.sets, c.general, window_on),
        }.get(c.selector, Beam(c.beam_width))
        if c.selector == "uniform" and window_on is None:
            return selectors.uniform(layers, k, c.offset)
        return choose(free, k, score)

    def heat_map(self) -> dict[str, list[float]]:
        """Each objective's figure with one layer's attention kept, layer by layer."""
        paths = [path_of(self.teacher, [x]) for x in range(self.scorer.net.num_layers)]
        known = self.scorer(paths)
        return {
            o.name: [o.value(known[tuple(p.tolist())][o.name]) for p in paths]
            for o in self.scorer.objectives
        }

    def describe(self, path: Any) -> dict[str, Any]:
        """Figures and intervals of one path, JSON-safe."""
        path = np.asarray(path)
        results = self.scorer([path])[tuple(path.tolist())]
        out: dict[str, Any] = {"path": path.tolist()}
        for o in self.scorer.objectives:
            entry: dict[str, Any] = {"figure": o.figure, "value": o.value(results[o.name])}
            questions = o.questions(results[o.name])
            if questions is not None:
                sign = 1 if o.more_is_better else -1
                low, high = sorted(sign * x for x in bootstrap(questions, samples=2000)[1:])
                entry["interval"] = [low, high]
            out[o.name] = entry
        return out

    def choose(self, k: int, objective: str, window_on: Layers | None = None) -> dict[str, Any]:
        """The choice of k layers, with what it was chosen from, JSON-safe."""
        layers = self.select(k, objective, window_on)
        judge, score = self.scorer.objective(objective), self.sets(objective, window_on)
        # Sets of this size that have been scored, by whichever selector.
        rivals = [s for s in self._scored(k, window_on) if s != layers]
        scores = score([layers, *rivals])
        questions = {
            s: judge.questions(
                self.scorer.known[tuple(self.path(s, window_on).tolist())][objective]
            )
            for s in scores
        }
        tied = selectors.ties(scores, questions, layers)
        ranked = sorted(scores, key=lambda s: (-scores[s], s))
        return {
            "selector": self.config.selector,
            "objective": objective,
            "count": k,
            "layers": list(layers),
            "scored": len(scores),
            "rank": ranked.index(layers) + 1,
            "within_one_standard_error": tied and [list(s) for s in tied],
            "result": self.describe(self.path(layers, window_on)),
        }

    def _scored(self, k: int, window_on: Layers | None) -> list[Layers]:
        out = []
        for path in self.scorer.known:
            full = {i for i, x in enumerate(path) if x == self.teacher[i]}
            kept = {i for i, x in enumerate(path) if x != LINEAR}
            if window_on is None and full == kept and len(kept) == k:
                out.append(tuple(sorted(kept)))
            elif window_on is not None and len(kept) == len(window_on) + k:
                rest = kept - set(window_on)
                if len(rest) == k and np.array_equal(self.path(tuple(rest), window_on), path):
                    out.append(tuple(sorted(rest)))
        return sorted(out)

    def curve(self) -> list[dict[str, Any]]:
        """For each number of layers the choice and every uniform placement, by the objective."""
        c, layers = self.config, self.scorer.net.num_layers
        judge = self.scorer.objective(c.full_by)
        rows = []
        for k in c.curve:
            chosen = self.select(k, c.full_by)
            offsets = range(max(1, layers // k)) if k else [0]
            even = sorted({selectors.uniform(layers, k, offset) for offset in offsets})
            score = self.sets(c.full_by)
            sign = 1 if judge.more_is_better else -1
            rows.append(
                {
                    "count": k,
                    "layers": list(chosen),
                    "learned": sign * score([chosen])[chosen],
                    "uniform": {str(list(s)): sign * x for s, x in score(even).items()},
                }
            )
        return rows

    def run(self) -> dict[str, Any]:
        """All of it: JSON-safe decisions and figures."""
        self.check()
        c, layers = self.config, self.scorer.net.num_layers
        gates = self.scorer.check_teacher()
        heat = self.heat_map()
        curve = self.curve()  # first, so that the choice is ranked among the same sets after a stop
        full = self.choose(c.full, c.full_by)
        kept = tuple(full["layers"])
        windows = self.choose(c.windows, c.window_by, kept) if c.windows else None
        path = self.path(tuple(windows["layers"]), kept) if windows else self.path(kept)
        return {
            "objectives": {o.name: o.figure for o in self.scorer.objectives},
            "teacher": gates,
            "all_linear": self.describe([LINEAR] * layers),
            "heat_map": heat,
            "full": full,
            "windows": windows,
            "curve": curve,
            "path": path.tolist(),
            "layer_types": list(self.scorer.net.hybrid(path).layer_types),
            "result": self.describe(path),
        }

    def table(self) -> list[dict[str, Any]]:
        """Every path that was scored with its figures, best first by the first objective."""
        objectives: Sequence[Any] = self.scorer.objectives
        rows = [
            {"path": list(path), **{o.name: o.value(found[o.name]) for o in objectives}}
            for path, found in self.scorer.known.items()
        ]
        first = objectives[0]
        sign = -1 if first.more_is_better else 1
        return sorted(rows, key=lambda row: (sign * row[first.name], row["path"]))


def _halo(sets, general, window_on, free, k, score):
    return selectors.halo_ratio(free, k, score, sets(general, window_on))
