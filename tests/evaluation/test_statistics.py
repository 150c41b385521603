"""Statistics against values worked out by hand or printed in tables."""

import math

import numpy as np
import pytest

from jet_jax.evaluation import statistics


def test_mcnemar_counts_what_only_one_got_right():
    first = [1] * 8 + [0] * 2 + [1] * 5
    second = [0] * 8 + [1] * 2 + [1] * 5
    # 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10
    assert statistics.mcnemar(first, second) == (8, 2, 112 / 1024)
    assert statistics.mcnemar(second, first) == (2, 8, 112 / 1024)
    assert statistics.mcnemar(first, first).p_value == 1.0


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (7, 2.36462), (30, 2.04227)],
)
def test_t_quantiles_are_those_of_the_tables(freedom, quantile):
    assert statistics.t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-5)
    assert statistics.t_quantile(0.025, freedom) == pytest.approx(-quantile, rel=1e-5)


def test_paired_t_by_hand():
    # differences 1, 2, 3: mean 2, standard deviation 1
    mean, low, high = statistics.paired_t([2, 4, 6], [1, 2, 3])
    half = 4.30265 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half), rel=1e-5)
    with pytest.raises(ValueError, match="more seeds"):
        statistics.paired_t([1], [2])


def test_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    x = np.random.default_rng(0).normal(3, 1, 400)
    mean, low, high = statistics.bootstrap(x, seed=1)
    assert mean == pytest.approx(x.mean())
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.05)
    assert statistics.bootstrap(x, seed=1) == (mean, low, high)
    assert statistics.bootstrap(x, seed=2) != (mean, low, high)


def test_bootstrap_weighs_documents_by_their_tokens():
    assert statistics.bootstrap([2.0, 30.0], [1, 10], samples=50).mean == pytest.approx(32 / 11)
    # Every document has 3 a token: nothing varies, however they are weighed.
    assert statistics.bootstrap([3.0, 30.0, 6.0], [1, 10, 2], samples=50)[1:] == (3, 3)


def test_bootstrap_difference_is_paired():
    x = np.random.default_rng(0).normal(0, 100, 50)
    assert statistics.bootstrap_difference(x + 1, x, samples=50) == pytest.approx((1, 1, 1))


def test_spearman_by_hand():
    # rank differences 0, 1, 1, 0: 1 - 6 * 2 / (4 * 15)
    assert statistics.spearman([1, 5, 3, 9], [10, 20, 30, 40]) == pytest.approx(0.8)
    assert statistics.spearman([1, 2, 3], [-1, -20, -300]) == pytest.approx(-1)
    # ties share ranks: (1.5, 1.5, 3) against (1, 2, 3)
    assert statistics.spearman([7, 7, 8], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: statistics.mcnemar([], []),
        lambda: statistics.paired_t([1, 2], [1]),
        lambda: statistics.bootstrap([]),
        lambda: statistics.bootstrap([1.0], confidence=95.0),
        lambda: statistics.spearman([1, 1], [1, 2]),
        lambda: statistics.t_quantile(1.0, 3),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()
