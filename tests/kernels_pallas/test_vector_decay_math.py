"""The kernels' mathematics of decays per key channel on values, against vector_decay in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.vector_decay import decay_factors, pair_scores
from kernels_pallas.vector_decay_math import (
    channel_gradients,
    channel_scores,
    decay_masks,
    end_factors,
    sum_rows,
)

CHUNK, WIDTH = 32, 16
DECAYS = {
    "none": (0.0, 0.0),
    "mild": (1e-3, 0.5),
    "of every size": (1e-5, 100.0),
    "strong": (100.0, 100.0),
}
# Of the scores and of the gradients of q, k and g. With bfloat16, the rounding of operands.
LIMITS = {"float32": (3e-7, 3e-7), "bfloat16": (3e-3, 4e-3)}


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def make(decay):
    """Returns q, k, g and cotangents of the scores, q e^G, k e^{G_C − G} and e^{G_C}."""
    rng = np.random.default_rng(0)
    low, high = DECAYS[decay]
    g = np.full((CHUNK, WIDTH), -low)
    if low < high:
        g = -np.exp(rng.uniform(np.log(low), np.log(high), g.shape))
    rows = rng.normal(size=(4, CHUNK, WIDTH))
    dscores = np.tril(rng.normal(size=(CHUNK, CHUNK)))
    dwhole = rng.normal(size=(1, WIDTH))
    arrays = rows[0], rows[1], g, dscores, rows[2], rows[3], dwhole
    return [x.astype(np.float32) for x in arrays]


@jax.jit
def _terms_and_gradients(q, k, g, cotangents):
    def terms(q, k, g):
        factors = decay_factors(g)
        scores = pair_scores(q[None], k[None], g, operands=jnp.dtype("float64"))[0, 0]
        return scores, q * factors.from_start, k * factors.to_end, factors.whole[None]

    out, pull = jax.vjp(terms, q, k, g)
    return out[0], pull(cotangents)


def expected(q, k, g, *cotangents):
    """Returns the scores and the gradients of q, k and g in float64."""
    with jax.enable_x64(True):
        q, k, g, *cotangents = (np.asarray(x, np.float64) for x in (q, k, g, *cotangents))
        return jax.tree.map(np.asarray, _terms_and_gradients(q, k, g, tuple(cotangents)))


@pytest.mark.parametrize("operands", LIMITS)
@pytest.mark.parametrize("decay", DECAYS)
def test_scores_and_gradients(decay, operands):
    arrays = make(decay)
    masks = decay_masks(CHUNK, jnp.dtype(operands))

    @jax.jit
    def run(q, k, g, dscores, *cotangents):
        dscores = dscores.astype(operands)
        gradients = channel_gradients(lambda: (q, k, g), dscores, *cotangents, masks)
        return channel_scores(q, k, g, masks), gradients

    scores, gradients = run(*arrays)
    want_scores, want_gradients = expected(*arrays)
    limit_scores, limit_gradients = LIMITS[operands]
    assert relative(scores, want_scores) < limit_scores
    for x, y in zip(gradients, want_gradients, strict=True):
        assert np.isfinite(x).all()
        assert relative(x, y) < limit_gradients


def test_factors_of_the_ends():
    g = jnp.asarray(make("of every size")[2])
    got, want = end_factors(g, decay_masks(CHUNK, jnp.dtype("float32"))), decay_factors(g)
    np.testing.assert_allclose(got.from_start, want.from_start, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(got.to_end, want.to_end, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(got.whole[0], want.whole, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("before", [False, True])
def test_every_pair_meets_once_and_its_spans_add_up(before):
    masks = decay_masks(CHUNK, jnp.dtype("float32"), before=before)
    met = np.zeros((CHUNK, CHUNK))
    t, j, i = np.ogrid[:CHUNK, :CHUNK, :CHUNK]
    span = (i > j) & ((i < t) if before else (i <= t))
    for covers, covers_by, pairs in zip(masks.covers, masks.covers_by, masks.pairs, strict=True):
        np.testing.assert_array_equal(covers_by, covers.T)
        met += pairs
        pairs = np.asarray(pairs, bool)
        both = np.asarray(covers)[:, None, :] + np.asarray(covers)[None, :, :]
        np.testing.assert_array_equal(both[pairs], span[pairs])
    np.testing.assert_array_equal(met, np.tril(np.ones_like(met), -1))
    np.testing.assert_array_equal(masks.through, np.tri(CHUNK, k=-before))
    np.testing.assert_array_equal(masks.after, 1 - np.tri(CHUNK))
    np.testing.assert_array_equal(masks.through_by, masks.through.T)
    np.testing.assert_array_equal(masks.after_by, masks.after.T)


@pytest.mark.parametrize(("operands", "limit"), [("float32", 1e-6), ("bfloat16", 1e-5)])
def test_sums_of_rows_keep_more_than_their_operands(operands, limit):
    x = make("mild")[2]
    got = sum_rows(jnp.tri(CHUNK, dtype=jnp.dtype(operands)), jnp.asarray(x))
    np.testing.assert_allclose(got, np.cumsum(x.astype(np.float64), axis=0), rtol=limit)
