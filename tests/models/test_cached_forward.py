"""A cache filled in chunks, however they are cut and padded, gives the uncached logits."""

import jax
import numpy as np
import pytest
from flax import nnx

from jet_jax.cache import init_cache
from jet_jax.params import split

VOCAB, TOLERANCE = 257, 2e-5
LENGTH, CHUNK = 60, 20  # the window (7) is shorter than a chunk
# Real tokens of each row in each chunk, and the side its padding stands on.
PLAN = [((20, 5), "left"), ((13, 20), "right"), ((0, 20), "right"), ((20, 3), "left")]


def relative(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, VOCAB, (2, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def run(hybrid):
    graphdef, params = split(hybrid)

    @jax.jit
    def step(params, tokens, segment_ids, cache):
        out = nnx.merge(graphdef, params).forward(tokens, segment_ids=segment_ids, cache=cache)
        return out.logits, out.cache

    return lambda tokens, segment_ids, cache: step(params, tokens, segment_ids, cache)


@pytest.fixture(scope="module")
def expected(hybrid, tokens):
    graphdef, params = split(hybrid)
    return np.asarray(jax.jit(lambda p, x: nnx.merge(graphdef, p)(x))(params, tokens))


def feed(run, tokens, expected, cache, real, side):
    """One padded chunk; checks its logits against the uncached ones."""
    chunk = np.full((2, CHUNK), 11, np.int32)
    segment_ids = np.zeros_like(chunk)
    before = np.asarray(cache.length)
    columns = []
    for row, count in enumerate(real):
        first = CHUNK - count if side == "left" else 0
        columns.append(slice(first, first + count))
        chunk[row, columns[row]] = tokens[row, before[row] : before[row] + count]
        segment_ids[row, columns[row]] = 1
    logits, cache = run(chunk, segment_ids, cache)
    for row, count in enumerate(real):
        if count:
            want = expected[row, before[row] : before[row] + count]
            assert relative(logits[row, columns[row]], want) < TOLERANCE, (real, side, row)
    np.testing.assert_array_equal(cache.length, before + np.asarray(real))
    return cache


@pytest.fixture(scope="module")
def filled(hybrid, run, tokens, expected):
    cache = init_cache(hybrid.config, 2, LENGTH)
    for real, side in PLAN:
        cache = feed(run, tokens, expected, cache, real, side)
    return cache


def test_unpadded_chunks_equal_padded_ones(hybrid, run, tokens, expected, filled):
    """Uneven chunks without segment ids: the same logits and, at the end, the same states."""
    one = init_cache(hybrid.config, 2, LENGTH)
    start = 0
    for length in (1, 30, 17):
        logits, one = run(tokens[:, start : start + length], None, one)
        assert relative(logits, expected[:, start : start + length]) < TOLERANCE
        start += length
    # Row 1 of the padded plan has seen exactly these 48 tokens.
    for mine, theirs, kind in zip(
        one.layers, filled.layers, hybrid.config.layer_types, strict=True
    ):
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            seen = 48 if kind == "attn" else a.shape[1]
            assert relative(a[1, :seen], b[1, :seen]) < TOLERANCE, kind


def test_finished_rows_stay_untouched(run, tokens, expected, filled):
    """T = 1 with segment id 0 changes no bit of a row; the other row decodes on."""
    step = np.stack([[200], tokens[1, 48:49]])
    logits, after = run(step, np.array([[0], [1]], np.int32), filled)
    assert relative(logits[1, 0], expected[1, 48]) < TOLERANCE
    np.testing.assert_array_equal(after.length, [53, 49])
    for a, b in zip(jax.tree.leaves(filled.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_padding_chunk_leaves_a_row_untouched(run, tokens, expected, filled):
    """A chunk of nothing but padding changes no bit of a row."""
    after = feed(run, tokens, expected, filled, (0, 12), "right")
    for a, b in zip(jax.tree.leaves(filled.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(a[0], b[0])


def test_decoding_equals_the_uncached_forward(run, tokens, expected, filled):
    """Both rows at their own lengths, token by token, to the end of the cache's room."""
    cache = filled
    for _ in range(7):
        at = np.asarray(cache.length)
        logits, cache = run(tokens[np.arange(2), at][:, None], None, cache)
        assert relative(logits[:, 0], expected[np.arange(2), at]) < TOLERANCE
