"""Paired comparisons and intervals, on the host in float64.

What is replicated decides the interval. Claims about a method need several training runs: seeds
fix the data order and the new weights for all arms alike, and `paired_t` compares two arms over
them. Claims about one model need many items or documents: `bootstrap` and `bootstrap_difference`
resample those, `mcnemar` compares two models' right answers to the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Values = Sequence[float | int] | np.ndarray


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    mean: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Questions that only the first and only the second got right, and the two-sided p-value."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: Any, second: Any) -> McNemar:
    """The exact McNemar test of two models' answers to the same questions.

    Args:
      first: bool, whether each question is right.
      second: the same of the other model.

    Raises:
      ValueError: the two differ in length or are empty.
    """
    a, b = _paired(first, second)
    ours, theirs = int(((a != 0) & (b == 0)).sum()), int(((a == 0) & (b != 0)).sum())
    total = ours + theirs
    tail = sum(math.comb(total, i) for i in range(min(ours, theirs) + 1))
    return McNemar(ours, theirs, min(1.0, 2 * tail / 2**total))


def paired_t(first: Values, second: Values, confidence: float = 0.95) -> Interval:
    """The t interval of the mean difference `first - second` over paired runs.

    With two runs it is 9 standard deviations wide to each side, with four 1.6, with eight 0.84.

    Raises:
      ValueError: fewer than two pairs, lists of different lengths or a confidence outside (0, 1).
    """
    a, b = _paired(first, second)
    _check(confidence)
    if len(a) < 2:
        raise ValueError("paired_t needs at least two pairs of runs; train with more seeds")
    difference = a - b
    mean = float(difference.mean())
    error = float(difference.std(ddof=1)) / math.sqrt(len(a))
    half = t_quantile(0.5 + confidence / 2, len(a) - 1) * error
    return Interval(mean, mean - half, mean + half)


def bootstrap(
    values: Values,
    weights: Values | None = None,
    *,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The percentile interval of a mean over items or documents.

    Args:
      values: one an item, or a document's sum.
      weights: what each sum counts, such as a document's tokens; the estimate is then
        `sum(values) / sum(weights)`. None counts each as 1.
      confidence: of the interval.
      samples: resamplings.
      seed: of the resampling.

    Raises:
      ValueError: no values, weights of another length, or a confidence outside (0, 1).
    """
    _check(confidence)
    x, w = _paired(values, np.ones(len(values)) if weights is None else weights)
    rng = np.random.default_rng(seed)
    ratios = np.empty(samples)
    block = max(1, 2**22 // len(x))  # 32 MiB of indices at once
    for start in range(0, samples, block):
        picked = rng.integers(0, len(x), (min(block, samples - start), len(x)))
        ratios[start : start + block] = x[picked].sum(1) / w[picked].sum(1)
    low, high = np.quantile(ratios, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(x.sum() / w.sum()), float(low), float(high))


def bootstrap_difference(
    first: Values, second: Values, weights: Values | None = None, **options: Any
) -> Interval:
    """`bootstrap` of `first - second`, both resampled with the same items or documents."""
    a, b = _paired(first, second)
    return bootstrap(a - b, weights, **options)


def spearman(first: Values, second: Values) -> float:
    """The rank correlation of two lists; equal values share the mean of their ranks.

    Raises:
      ValueError: lists of different lengths, fewer than two values, or all of one list equal.
    """
    a, b = (_ranks(x) for x in _paired(first, second))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float((a * a).sum() * (b * b).sum()))
    if not size:
        raise ValueError("spearman needs two lists of at least two different values")
    return float((a * b).sum()) / size


def t_quantile(probability: float, freedom: int) -> float:
    """The value below which Student's t with `freedom` degrees of freedom lies so often.

    Raises:
      ValueError: a probability outside (0, 1) or no degree of freedom.
    """
    if not 0 < probability < 1 or freedom < 1:
        raise ValueError(f"t_quantile: probability={probability}, freedom={freedom}")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return high


def t_cdf(x: float, freedom: int) -> float:
    """How often Student's t lies below `x`, by the finite series for whole degrees of freedom.

    Abramowitz & Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(x / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term = cosine if is_odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if is_odd else 2, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + sine * total) if is_odd else sine * total
    return 0.5 + inside / 2


def _ranks(x: np.ndarray) -> np.ndarray:
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[group]


def _paired(first: Any, second: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = (np.asarray(x, np.float64) for x in (first, second))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"expected two lists of equal length with a value for each pair, got shapes {a.shape} "
            f"and {b.shape}"
        )
    return a, b


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
