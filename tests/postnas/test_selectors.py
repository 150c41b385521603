"""Selectors on score tables whose answer is known."""

import itertools

import numpy as np
import pytest

from jet_jax.postnas import selectors
from jet_jax.postnas.selectors import Beam


def additive(weights, pairs=()):
    """Scores sets by their layers' weights, and by pairs that are worth something together only."""
    asked = []

    def score(sets):
        sets = [tuple(s) for s in sets]
        asked.extend(sets)
        bonus = dict(pairs)
        return {
            s: float(
                sum(weights[x] for x in s)
                + sum(bonus.get(p, 0) for p in itertools.combinations(s, 2))
            )
            for s in sets
        }

    score.asked = asked
    return score


def test_a_joint_choice_differs_from_the_single_ranking():
    """As in the paper, whose pair 15, 20 does not hold the two best single layers."""
    score = additive([0, 5, 4, 0, 1, 0], {(1, 4): 10, (1, 2): -3}.items())
    assert selectors.single(range(6), 2, score) == (1, 2)
    assert Beam()(range(6), 2, score) == (1, 4)
    assert len(score.asked) == 6 + 15  # all pairs, each once


def test_a_beam_finds_what_greed_misses_and_scores_fewer_sets():
    weights = [0.0] * 20
    weights[3], weights[7], weights[11] = 3.0, 2.9, 2.8
    score = additive(weights, {(7, 11): 6, (3, 7): -4, (3, 11): -4}.items())
    assert 3 in selectors.greedy(range(20), 2, score)
    score.asked.clear()
    assert Beam(width=3, exhaustive=10)(range(20), 2, score) == (7, 11)
    assert len(score.asked) < 20 + 3 * 20
    assert len(set(score.asked)) == len(score.asked)  # sets are made once


def test_equal_scores_go_to_the_lower_layers():
    score = additive([1.0] * 5)
    assert Beam()(range(5), 2, score) == (0, 1)
    assert Beam(width=2, exhaustive=0)(range(5), 2, score) == (0, 1)
    assert selectors.single([4, 2, 3], 2, score) == (2, 3)


def test_halo_ratio_weighs_what_is_lost_against_what_is_lost_in_general():
    retrieval = additive([1.0, 5.0, 4.0, 0.0])
    general = additive([0.1, 50.0, 1.0, 0.1])
    assert selectors.halo_ratio(range(4), 2, retrieval, general) == (0, 2)


def test_uniform_and_random_placements():
    assert selectors.uniform(30, 2) == (0, 15)
    assert selectors.uniform(30, 2, 14) == (14, 29)
    assert selectors.uniform(7, 3, 1) == (1, 3, 5)
    with pytest.raises(ValueError, match="offset=15 must lie between 0 and 14"):
        selectors.uniform(30, 2, 15)
    drawn = {selectors.random_layers(range(9), 3, seed) for seed in range(20)}
    assert len(drawn) > 10 and all(len(set(s)) == 3 and s == tuple(sorted(s)) for s in drawn)
    assert selectors.random_layers(range(9), 3, 4) == selectors.random_layers(range(9), 3, 4)


def test_too_many_layers_are_refused():
    with pytest.raises(ValueError, match="7 layers cannot be chosen among 6"):
        Beam()(range(6), 7, additive([0] * 6))


def test_ties_are_within_a_standard_error_of_paired_differences():
    base = np.tile([0.0, 1.0], 200)
    near, far = base.copy(), base.copy()
    near[:8] = 1 - near[:8]  # as often better as worse
    near[8] = 1.0  # and once more
    far[1:200:2] = 0
    questions = {(0,): base, (1,): near, (2,): far, (3,): None}
    scores = {(0,): 0.5, (1,): 0.5025, (2,): 0.25, (3,): 0.5}
    assert selectors.ties(scores, questions, (1,)) == [(0,)]
