"""Token scores against all logits at once, sums against loops, figures against small cases."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jet_jax.evaluation.rows import Passage, pack
from jet_jax.evaluation.scoring import (
    item_sums,
    perplexity_by_bucket,
    summarise,
    summarise_buckets,
    token_scores,
)


def _logs(hidden, head):
    logits = hidden.astype(np.float64) @ head.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_token_scores_equal_those_of_all_logits():
    rng = np.random.default_rng(0)
    batch, length, vocab = 2, 11, 29
    hidden = rng.normal(size=(batch, length, 8)).astype(np.float32)
    head = rng.normal(size=(8, vocab)).astype(np.float32)
    teacher = rng.normal(size=(batch, length, 5)).astype(np.float32)
    teacher_head = rng.normal(size=(5, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    student, other = _logs(hidden, head), _logs(teacher, teacher_head)
    targets[0] = student[0].argmax(-1)
    # Room for three positions of both models: chunks that do not divide the length.
    score = jax.jit(functools.partial(token_scores, max_logits=2 * 3 * batch * vocab))
    got = score(hidden, head, targets, teacher, teacher_head)
    at = np.indices(targets.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(got["logprob"], student[*at, targets])
    close(got["teacher_logprob"], other[*at, targets])
    close(got["kl"], (np.exp(other) * (other - student)).sum(-1))
    np.testing.assert_array_equal(got["correct"], student.argmax(-1) == targets)
    np.testing.assert_array_equal(got["agree"], student.argmax(-1) == other.argmax(-1))
    assert np.asarray(got["correct"])[0].all() and not np.asarray(got["correct"])[1].all()


def test_half_a_teacher_or_another_vocabulary_is_refused():
    hidden, head, targets = jnp.ones((1, 2, 3)), jnp.ones((3, 4)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="both teacher_hidden and teacher_head"):
        token_scores(hidden, head, targets, hidden)
    with pytest.raises(ValueError, match="has 5 tokens, the student's 4"):
        # Without the type checker, which comes first in tests.
        inspect.unwrap(token_scores)(hidden, head, targets, hidden, jnp.ones((3, 5)))


def test_only_the_first_of_equal_logits_is_correct():
    scores = token_scores(jnp.zeros((1, 2, 3)), jnp.ones((3, 4)), jnp.array([[0, 1]]))
    np.testing.assert_array_equal(scores["correct"], [[True, False]])


SCORES = {
    "logprob": jnp.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]]),
    "correct": jnp.array([[True, True, False], [True, False, True]]),
}


def test_item_sums_leave_out_what_is_not_scored_and_add_up():
    answers = jnp.array([[0, 1, 1], [2, 0, 3]])
    sums = jax.jit(item_sums, static_argnums=2)(SCORES, answers, 3)
    np.testing.assert_array_equal(sums["logprob"], [-6, -8, -32])
    np.testing.assert_array_equal(sums["tokens"], [2, 1, 1])
    np.testing.assert_array_equal(sums["wrong"], [1, 0, 0])
    one = item_sums({k: x[:1] for k, x in SCORES.items()}, answers[:1], 3)
    two = item_sums({k: x[1:] for k, x in SCORES.items()}, answers[1:], 3)
    for name in sums:
        np.testing.assert_array_equal(one[name] + two[name], sums[name])


def test_buckets_begin_at_their_edges():
    positions = jnp.array([[0, 1, 2], [3, 4, 0]])
    mask = jnp.array([[1, 1, 1], [1, 1, 0]])
    scores = SCORES | {"kl": -2 * SCORES["logprob"], "teacher_logprob": SCORES["logprob"] / 2}
    scores["agree"] = ~SCORES["correct"]
    sums = perplexity_by_bucket(scores, positions, mask, edges=(2, 4, 9))
    np.testing.assert_array_equal(sums["nll"], [3, 12, 16, 0])
    np.testing.assert_array_equal(sums["tokens"], [2, 2, 1, 0])
    table = summarise_buckets(sums, edges=(2, 4, 9))
    assert list(table) == ["0-1", "2-3", "4-8", "all"]
    assert table["2-3"] == {
        "tokens": 2, "nll": 6, "correct": 0.5, "kl": 12, "agree": 0.5, "teacher_nll": 3,
    }  # fmt: skip
    assert table["all"]["nll"] == pytest.approx(31 / 5)


def test_free_answers_are_right_if_no_token_is_wrong():
    rows = pack([Passage([1]).ask([2, 3]), Passage([1]).ask([4])], 2, name="free")
    sums = {"logprob": [-3.0, -5.0], "tokens": [2, 1], "wrong": [1, 0]}
    result = summarise(rows, sums)
    assert (result["accuracy"], result["loss"], result["items"]) == (0.5, 4.0, 2.0)
    np.testing.assert_array_equal(result["per_question"]["correct"], [False, True])
    with pytest.raises(ValueError, match="cover 2 answer tokens, the rows hold 3"):
        summarise(rows, sums | {"tokens": [2, 0]})


def test_choices_are_compared_within_their_question():
    """Question 1 comes first in the set; question 0 is right only by the token; 2 is a tie."""
    sizes, groups = [1, 1, 1, 3, 1, 1], [1, 1, 0, 0, 2, 2]
    right = [True, False, False, True, True, False]
    passages = [Passage([1]).ask([2] * n) for n in sizes]
    rows = pack(passages, 3, name="choices", groups=groups, right=right)
    logprob = np.array([-1.0, -2.0, -3.0, -6.0, -1.0, -1.0])
    sums = {"logprob": logprob, "tokens": sizes, "wrong": np.zeros(6)}
    result = summarise(rows, sums)
    per_question = result["per_question"]
    np.testing.assert_array_equal(per_question["correct"], [False, True, False])
    np.testing.assert_array_equal(per_question["correct_norm"], [True, True, False])
    np.testing.assert_array_equal(per_question["loss"], [6, 1, 1])
    np.testing.assert_array_equal(per_question["chosen"][:2], [2, 0])
    expected = [np.log1p(np.exp(3)), np.log1p(np.exp(-1)), np.log(2)]
    np.testing.assert_allclose(per_question["choice_loss"], expected)
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert (result["questions"], result["items"]) == (3.0, 6.0)
