"""Packed and padded rows equal the documents run alone: forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jet_jax.params import flatten, split

VOCAB, WIDTH = 257, 150
# (row, first column, length): right padding, both borders padded, padding between documents,
# left padding only, right padding only. Longer than the window (7) and than a chunk (64).
DOCUMENTS = [(0, 0, 70), (0, 70, 70), (1, 3, 9), (1, 12, 70), (1, 87, 9), (2, 80, 70), (3, 0, 70)]
TOLERANCE = 2e-5


def relative(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def losses(logits, tokens):
    """Negative log-likelihood of each next token: [B, T-1]."""
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


def test_packed_rows_equal_documents_alone(hybrid):
    """Logits and the gradient of the summed loss, all padding filled with arbitrary tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (4, WIDTH)).astype(np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, start, length in DOCUMENTS:
        segment_ids[row, start : start + length] = segment_ids[row].max() + 1
    within = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] != 0)
    graphdef, params = split(hybrid)

    def packed(params):
        logits = nnx.merge(graphdef, params)(jnp.asarray(tokens), jnp.asarray(segment_ids))
        return jnp.sum(losses(logits, jnp.asarray(tokens)) * within), logits

    def alone(params, documents):
        logits = nnx.merge(graphdef, params)(documents)
        return jnp.sum(losses(logits, documents)), logits

    (loss, logits), gradient = jax.jit(jax.value_and_grad(packed, has_aux=True))(params)
    run = jax.jit(jax.value_and_grad(alone, has_aux=True))
    total, summed = 0.0, None
    for length in (9, 70):
        places = [d for d in DOCUMENTS if d[2] == length]
        documents = np.stack([tokens[r, s : s + length] for r, s, _ in places])
        (part, expected), one = run(params, documents)
        for got, (row, start, _) in zip(expected, places, strict=True):
            assert relative(logits[row, start : start + length], got) < TOLERANCE, (row, start)
        total += float(part)
        summed = one if summed is None else jax.tree.map(jnp.add, summed, one)
    assert abs(float(loss) - total) < 1e-5 * abs(total)
    expected = flatten(summed)
    for name, value in flatten(gradient).items():
        assert np.linalg.norm(expected[name]) > 0, f"{name} gets no gradient"
        assert relative(value, expected[name]) < 1e-4, name


def test_left_padding_equals_right_padding(hybrid):
    """The same documents at either end of the row."""
    rng = np.random.default_rng(1)
    documents = rng.integers(0, VOCAB, (2, 30)).astype(np.int32)
    left, right, at_left, at_right = (np.zeros((2, 40), np.int32) for _ in range(4))
    left[:, 10:], at_left[:, 10:] = documents, 1
    right[:, :30], at_right[:, :30] = documents, 1
    graphdef, params = split(hybrid)
    run = jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a))
    a, b = run(params, left, at_left), run(params, right, at_right)
    assert np.isfinite(a).all() and np.isfinite(b).all()  # at the padding too
    assert relative(a[:, 10:], b[:, :30]) < TOLERANCE
