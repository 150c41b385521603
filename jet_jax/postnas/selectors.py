"""Choosing which layers keep their attention: one function a selector, all over one scorer.

Each takes the layers that are free, a number k and a function that scores layer sets (more is
better), and returns the layers. Sets are scored as they would be used, all together; only `single`
and `halo_ratio` look at layers one by one, which is what they are there to be compared for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Layers = tuple[int, ...]
ScoreSets = Callable[[Iterable[Layers]], dict[Layers, float]]

EXHAUSTIVE = 400  # sets up to which all are scored


@dataclass(frozen=True)
class Beam:
    """Beam search from no layer upwards, or all sets where there are few.

    Attributes:
      width: sets kept at each size.
      exhaustive: number of sets up to which all of size k are scored.

    Source: arXiv 2508.15884 §2.2 names beam search; width and start are ours.
    """

    width: int = 8
    exhaustive: int = EXHAUSTIVE

    def __call__(self, free: Sequence[int], k: int, score: ScoreSets) -> Layers:
        """The best set of k layers that was scored."""
        check_count(free, k)
        if math.comb(len(free), k) <= self.exhaustive:
            return best(score(itertools.combinations(sorted(free), k)))
        kept: list[Layers] = [()]
        for _ in range(k):
            wider = {tuple(sorted((*s, x))) for s in kept for x in free if x not in s}
            scores = score(sorted(wider))
            kept = sorted(scores, key=lambda s: (-scores[s], s))[: self.width]
        return kept[0]


def greedy(free: Sequence[int], k: int, score: ScoreSets) -> Layers:
    """Adds the layer that helps most, k times: the KL-guided choice where the score is -KL.

    Source: arXiv 2512.20569, which trains on before it scores; here the supernet is.
    """
    return Beam(width=1, exhaustive=0)(free, k, score)


def single(free: Sequence[int], k: int, score: ScoreSets) -> Layers:
    """The k best layers alone, each with all others linear."""
    check_count(free, k)
    scores = score([(x,) for x in sorted(free)])
    return tuple(sorted(x for (x,) in sorted(scores, key=lambda s: (-scores[s], s))[:k]))


def halo_ratio(
    free: Sequence[int], k: int, retrieval: ScoreSets, general: ScoreSets, floor: float = 1e-3
) -> Layers:
    """The layers whose loss alone costs most retrieval for each general ability that it costs.

    Args:
      free: layers to choose among.
      k: how many.
      retrieval: scores of the sets that keep their attention, on retrieval.
      general: the same on a general task, such as commonsense or -KL.
      floor: least general drop, which keeps the ratio finite.

    Source: arXiv 2601.22156 (HALO): one layer linear, the rest full, straight after alignment.
    """
    check_count(free, k)
    layers = tuple(sorted(free))
    without = [tuple(x for x in layers if x != gone) for gone in layers]
    ratios = {}
    lost = [scores(without + [layers]) for scores in (retrieval, general)]
    for gone, rest in zip(layers, without, strict=True):
        drops = [scores[layers] - scores[rest] for scores in lost]
        ratios[gone] = drops[0] / max(drops[1], floor)
    return tuple(sorted(sorted(ratios, key=lambda x: (-ratios[x], x))[:k]))


def uniform(layers: int, k: int, offset: int = 0) -> Layers:
    """Every (L/k)-th layer, begun at `offset`: the placement that a search has to beat.

    Raises:
      ValueError: the offset reaches the next period.
    """
    check_count(range(layers), k)
    if k == 0:
        return ()
    if not 0 <= offset < max(1, layers // k):
        raise ValueError(f"offset={offset} must lie between 0 and {max(1, layers // k) - 1}")
    return tuple(offset + (i * layers) // k for i in range(k))


def random_layers(free: Sequence[int], k: int, seed: int) -> Layers:
    """k layers by chance."""
    check_count(free, k)
    chosen = np.random.default_rng(seed).choice(sorted(free), k, replace=False)
    return tuple(sorted(int(x) for x in chosen))


def check_count(free: Sequence[int], k: int) -> None:
    """Raises ValueError unless there are k layers to choose."""
    if not 0 <= k <= len(free):
        raise ValueError(f"{k} layers cannot be chosen among {len(free)}")


def best(scores: dict[Any, float]) -> Layers:
    """The best set; of equals the one with the lower layers."""
    if not scores:
        raise ValueError("no set of layers was scored")
    return min(scores, key=lambda s: (-scores[s], s))


def ties(
    scores: dict[Layers, float], questions: dict[Layers, np.ndarray | None], winner: Layers
) -> list[Layers] | None:
    """The sets within one standard error of the winner, which the data do not tell from it.

    Args:
      scores: of all sets.
      questions: scores question by question, or None where there are none (then nothing ties).
      winner: the chosen set.

    Returns:
      The sets whose mean difference from the winner is at most its standard error over questions,
      paired, the winner left out; None where there are no scores by question.
    """
    if questions[winner] is None:
        return None
    out = []
    for layers in scores:
        ours, theirs = questions[winner], questions[layers]
        if layers == winner or ours is None or theirs is None:
            continue
        gap = ours - theirs
        error = gap.std(ddof=1) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
        if gap.mean() <= error:
            out.append(layers)
    return sorted(out)
