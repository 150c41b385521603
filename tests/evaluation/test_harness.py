"""The harness on tiny models: accuracy is that of greedy generation, a teacher is compared."""

import jax
import numpy as np
import pytest

from jet_jax import generate
from jet_jax.evaluation import harness
from jet_jax.evaluation.rows import Passage, pack

PROMPTS = [[5, 9, 200], [17, 3], [250, 1, 1, 30], [88, 7]]
NEW = 4


@pytest.fixture(scope="module")
def student(make_model):
    return make_model(1)


@pytest.fixture(scope="module")
def greedy(student):
    return generate(student, PROMPTS, NEW, eos_id=())


@pytest.fixture(scope="module")
def rows(greedy):
    """Two answers as the model gives them, one with its last token and one with its first changed.

    Two prompts share a row, and the last batch is not full.
    """
    answers = [list(answer) for answer in greedy]
    answers[1][-1] = (answers[1][-1] + 1) % 257
    answers[3][0] = (answers[3][0] + 1) % 257
    passages = [Passage(p).ask(a) for p, a in zip(PROMPTS, answers, strict=True)]
    return pack(passages, 11, name="greedy")


def test_accuracy_is_that_of_greedy_generation(student, rows, greedy):
    assert len(rows.tokens) == 3 and rows.segment_ids.max() == 2
    result = harness.evaluate(student, rows, batch_size=2)
    np.testing.assert_array_equal(result["per_question"]["correct"], [True, False, True, False])
    assert result["accuracy"] == 0.5
    text = np.array([PROMPTS[0] + greedy[0]], np.int32)
    logits = np.asarray(jax.jit(lambda ids: student(ids))(text), np.float64)[0]
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    at = np.arange(NEW) + len(PROMPTS[0]) - 1
    expected = logs[at, greedy[0]].sum()
    np.testing.assert_allclose(result["per_item"]["logprob"][0], expected, rtol=1e-4)
    assert result["buckets"]["all"]["tokens"] == 4 * NEW


def test_a_teacher_is_compared_and_a_forward_function_serves(student, make_model, rows):
    other = make_model(2)
    same = harness.evaluate(student, rows, 2, teacher=student)
    assert same["kl"] == pytest.approx(0, abs=1e-5) and same["agreement"] == 1

    def apply(params, batch):
        out = params.forward(batch["tokens"], segment_ids=batch["segment_ids"], logits_at="none")
        return out.hidden, params.head_kernel()

    result = harness.evaluate(harness.Forward(apply, other), rows, 2, teacher=student)
    assert result["kl"] > 0.1 and result["agreement"] < 1
    mean = result["per_item"]["kl"].sum() / result["per_item"]["tokens"].sum()
    assert result["kl"] == pytest.approx(mean, rel=1e-5)
    assert same["per_item"]["teacher_logprob"] == pytest.approx(
        result["per_item"]["teacher_logprob"], rel=1e-4
    )


def test_another_set_of_the_same_shape_compiles_the_model_no_more(student, rows):
    harness.evaluate(student, rows, 2)
    before = harness._scores._cache_size()
    fewer = pack([Passage(PROMPTS[0]).ask([1, 2])], 11, name="one")
    harness.evaluate(student, fewer, 2)
    assert harness._scores._cache_size() == before


def test_free_running_counts_to_where_the_student_leaves(student, make_model, greedy):
    teacher = make_model(2)
    own = generate(teacher, PROMPTS, NEW, eos_id=())
    result = harness.free_running(student, teacher, PROMPTS, NEW)
    for mine, theirs, agreed in zip(greedy, own, result["per_prompt"]["agreed"], strict=True):
        assert mine[: int(agreed)] == theirs[: int(agreed)]
        assert agreed == NEW or mine[int(agreed)] != theirs[int(agreed)]
    assert result["student_nll"] > result["teacher_nll"]
    alone = harness.free_running(teacher, teacher, PROMPTS, NEW)
    assert alone["agreed"] == NEW and alone["student_nll"] == alone["teacher_nll"]
    with pytest.raises(ValueError, match="list of prompts is empty"):
        harness.free_running(student, teacher, [])
