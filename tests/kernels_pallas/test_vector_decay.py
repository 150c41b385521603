"""Decay factors and scores with one decay a key channel, against sums of exponents in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.vector_decay import decay_factors, lowest, pair_scores, spans, with_borders

BEFORE = (False, True)
FLOAT32 = jnp.dtype("float32")


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def make(case, size=32, width=12):
    """Returns reads [R C K], writes [W C K], log decays [C K] and cotangents of the scores."""
    rng = np.random.default_rng(0)
    reads, writes = rng.normal(size=(2, 2, size, width))
    g = {
        "none": np.zeros((size, width)),
        "mild": -rng.uniform(0, 0.5, (size, width)),
        "strong": np.full((size, width), -100.0),
        "of every size": -np.exp(rng.uniform(np.log(1e-5), np.log(100), (size, width))),
        "slow channels beside fast ones": -np.broadcast_to(
            np.geomspace(1e-5, 100, width), (size, width)
        ),
        "a border": -rng.uniform(0, 1e-3, (size, width)),
    }[case]
    if case == "a border":
        g[11] = lowest(FLOAT32)
    arrays = reads, writes, g, rng.normal(size=(2, 2, size, size))
    return [x.astype(np.float32) for x in arrays]


def direct(reads, writes, g):
    """The definition, pair by pair; g of a border is cut off as in float32."""
    size = g.shape[0]
    seen = jnp.tri(size, size, dtype=bool)
    masks = jnp.stack([jnp.tril(seen, -1 if before else 0) for before in BEFORE])
    # Sums over the rows of each span, so that not even float64 takes a difference.
    t, j, s = (jnp.arange(size).reshape(shape) for shape in ((-1, 1, 1), (1, -1, 1), (1, 1, -1)))
    covers = jnp.stack([(s > j) & ((s < t) if before else (s <= t)) for before in BEFORE])
    exponent = jnp.einsum("rtjs,sk->rtjk", covers.astype(g.dtype), g)
    decayed = jnp.exp(exponent) * reads[:, :, None]
    return masks[:, None] * jnp.einsum("rtjk,wjk->rwtj", decayed, writes)


@functools.partial(jax.jit, static_argnames=("function",))
def scores_and_gradients(function, reads, writes, g, cotangent):
    out, pull = jax.vjp(function, reads, writes, g)
    return out, *pull(cotangent)


CASES = [
    "none",
    "mild",
    "strong",
    "of every size",
    "slow channels beside fast ones",
    "a border",
]


OURS = functools.partial(pair_scores, before=BEFORE, operands=FLOAT32)


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_are_the_definition(case):
    arrays = make(case)
    got = scores_and_gradients(OURS, *arrays)
    with jax.enable_x64(True):
        expected = scores_and_gradients(direct, *(x.astype(np.float64) for x in arrays))
        expected = [np.asarray(x) for x in expected]
    for x, y in zip(got, expected, strict=True):
        assert np.isfinite(x).all()
        assert relative(x, y) < 5e-7
    if case == "a border":
        assert not got[0][0, :, 11:, :11].any()
        assert not got[0][1, :, 12:, :11].any()  # row 11 reads before its decay
        assert not got[3][11].any()


def test_bfloat16_operands_cost_their_rounding():
    arrays = make("of every size", size=64)
    round_ = lambda dtype: functools.partial(pair_scores, before=BEFORE, operands=dtype)  # noqa: E731
    got, exact = (
        scores_and_gradients(round_(jnp.dtype(x)), *arrays) for x in ("bfloat16", "float32")
    )
    assert all(x.dtype == jnp.float32 for x in got)
    assert all(relative(x, y) < 4e-3 for x, y in zip(got, exact, strict=True))
    assert relative(got[0], exact[0]) > 1e-4


def test_small_decays_survive_behind_large_ones():
    """Differences of running sums, rounded at 12800, would lose all of them."""
    _, _, g, _ = make("mild", size=128)
    g[:64] = -100
    factors = jax.jit(decay_factors)(g)
    sums = np.cumsum(g[::-1].astype(np.float64), axis=0)[::-1]
    np.testing.assert_allclose(factors.to_end[64:-1], np.exp(sums[65:]), rtol=2e-6)
    assert not np.asarray(factors.from_start[1:]).any() and not np.asarray(factors.whole).any()


@pytest.mark.parametrize("block", [1, 4, 16])
def test_spans(block):
    _, _, g, _ = make("mild", size=16, width=3)
    got = spans(jnp.asarray(g), block)
    blocks = g.reshape(-1, block, 3).astype(np.float64)
    through = np.cumsum(blocks, axis=1)
    np.testing.assert_allclose(got.through, through, rtol=1e-6)
    np.testing.assert_allclose(got.before, through - blocks, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.after, through[:, -1:] - through, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.whole, through[:, -1:], rtol=1e-6)


def test_borders_stand_at_the_first_tokens_of_later_segments():
    ids = np.array([[0, 1, 1, 0, 2, 2, 3, 0]], np.int32)
    g = np.full((1, 8, 1, 2), -1.0, np.float32)
    g[0, 2] = -np.inf
    got = with_borders(jnp.asarray(g), jnp.asarray(ids))[0, :, 0]
    low = lowest(FLOAT32)
    want = np.array([0, -1, low, 0, low, -1, low, 0], np.float32)
    np.testing.assert_array_equal(got, np.stack([want, want], axis=1))
    np.testing.assert_array_equal(with_borders(jnp.asarray(g), None)[0, 2, 0], [low, low])


def test_only_arguments_are_kept_for_the_gradient():
    reads, writes, g, _ = make("mild")
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(OURS, *x)[1], reads, writes, g))
    allowed = sum(x.size for x in (reads, writes, g)) + len(BEFORE)
    assert sum(x.size for x in kept) <= allowed
