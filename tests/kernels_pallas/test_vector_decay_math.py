"""The kernels' mathematics of decays per key channel on values, against vector_decay in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.half_chunks import with_beyond
from kernels_pallas.vector_decay import decay_factors, pair_scores
from kernels_pallas.vector_decay_gradients import Gradients, tile_gradients
from kernels_pallas.vector_decay_math import (
    BOUND,
    add_scores,
    base_bits,
    base_masks,
    end_factors,
    level_masks,
    masked_sum,
    num_levels,
    pieces,
)

CHUNK, WIDTH = 32, 16
DECAYS = {
    "none": (0.0, 0.0),
    "mild": (1e-3, 0.5),
    "just within the bound": (0.5, 2.0),
    "beyond it": (1.0, 6.0),
    "of every size": (1e-5, 100.0),
    "strong": (100.0, 100.0),
}
# Of the scores, and of the gradients of reads, writes and g; bfloat16: rounded operands.
LIMITS = {"float32": (3e-7, 3e-7), "bfloat16": (3e-3, 4e-3)}


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def make(decay):
    """Returns reads, writes, g and cotangents of scores, scaled reads and writes, and the whole."""
    rng = np.random.default_rng(0)
    low, high = DECAYS[decay]
    g = np.full((CHUNK, WIDTH), -low)
    if low < high:
        g = -np.exp(rng.uniform(np.log(low), np.log(high), g.shape))
    rows = rng.normal(size=(4, CHUNK, WIDTH))
    dscores = np.tril(rng.normal(size=(CHUNK, CHUNK)), -1)
    dwhole = rng.normal(size=(1, WIDTH))
    arrays = rows[0], rows[1], g, dscores, rows[2], rows[3], dwhole
    return [x.astype(np.float32) for x in arrays]


@jax.jit
def _terms_and_gradients(reads, writes, g, cotangents):
    def terms(reads, writes, g):
        factors = decay_factors(g)
        operands = jnp.dtype("float64")
        scores = pair_scores(reads[None], writes[None], g, before=(True,), operands=operands)[0, 0]
        return scores, reads * factors.before, writes * factors.to_end, factors.whole[None]

    out, pull = jax.vjp(terms, reads, writes, g)
    return out[0], pull(cotangents)


def expected(reads, writes, g, *cotangents):
    """Returns the scores and the gradients of reads, writes and g in float64."""
    with jax.enable_x64(True):
        reads, writes, g, *cotangents = (
            np.asarray(x, np.float64) for x in (reads, writes, g, *cotangents)
        )
        return jax.tree.map(np.asarray, _terms_and_gradients(reads, writes, g, tuple(cotangents)))


def bits_of(g, size, operands):
    return 0 if operands == jnp.float32 else base_bits(jnp.max(-g), size)


@pytest.mark.parametrize("operands", LIMITS)
@pytest.mark.parametrize("decay", DECAYS)
def test_scores(decay, operands):
    reads, writes, g, *_ = arrays = make(decay)
    operands = jnp.dtype(operands)

    @jax.jit
    def run(reads, writes, g):
        zeros = jnp.zeros((CHUNK, CHUNK))
        bits = bits_of(g, CHUNK, operands)
        return add_scores(((zeros,),), (reads,), (writes,), g, bits, operands)[0][0]

    scores = run(reads, writes, g)
    assert relative(scores, expected(*arrays)[0]) < LIMITS[str(operands)][0]


@functools.partial(jax.jit, static_argnames=("operands", "halves"))
def gradients(arrays, operands, halves):
    """Takes the gradients all rows at once or half by half."""
    reads, writes, g, dscores, dreads, dwrites, dwhole = arrays
    size = CHUNK // halves
    parts = [slice(i * size, (i + 1) * size) for i in range(halves)]
    found, beyond = [], []
    for n, own in enumerate(parts):
        other = parts[1 - n] if halves > 1 else None

        def give(rows):
            return lambda: ((reads[rows],), (writes[rows],), g[rows])

        def block(reads_other, writes_other, n=n):
            at = [parts[1 - n if is_other else n] for is_other in (reads_other, writes_other)]
            return (((dscores[at[0], at[1]].astype(operands),),),)

        tile = tile_gradients(
            give(own),
            None if other is None else give(other),
            block,
            Gradients((dreads[own],), (dwrites[own],), g[own]),
            dwhole,
            jnp.bool_(n == 1),
            bits_of(g[own], size, operands),
            operands,
        )
        found.append((tile.own.reads[0], tile.own.writes[0], tile.own.g))
        beyond.append(tile.beyond)
    dq, dk, dg = (jnp.concatenate(x) for x in zip(*found, strict=True))
    if halves > 1:
        dg = with_beyond(dg[None, :, None], jnp.concatenate(beyond)[None, None])[0, :, 0]
    return dq, dk, dg


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("operands", LIMITS)
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients(decay, operands, halves):
    arrays = make(decay)
    got = gradients(arrays, jnp.dtype(operands), halves)
    for name, x, y in zip(("reads", "writes", "g"), got, expected(*arrays)[1], strict=True):
        assert np.isfinite(x).all(), name
        assert relative(x, y) < LIMITS[operands][1], name


def test_blocks_about_their_middle_are_as_large_as_the_bound_allows():
    sizes = {0.0: 6, 1.0: 6, 1.01: 5, 2.0: 5, 2.1: 4, 16.0: 2, 32.0: 1, 32.1: 0, 120.0: 0}
    for most, bits in sizes.items():
        assert base_bits(jnp.float32(most), 64) == bits
        assert most * 2**bits / 2 <= BOUND or bits == 0
    assert base_bits(jnp.float32(0.1), 32) == 5


def test_factors_of_the_ends():
    g = jnp.asarray(make("of every size")[2])
    got, want = end_factors(g, jnp.dtype("float32")), decay_factors(g)
    np.testing.assert_allclose(got.before, want.before, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(got.after, want.to_end, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(got.whole[0], want.whole, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("bits", range(num_levels(CHUNK) + 1))
def test_every_pair_meets_once_and_its_spans_add_up(bits):
    """From blocks of 2^bits rows about their middle up: between the rows, neither's own."""
    i = np.arange(CHUNK)
    between = (i < i[:, None, None]) & (i > i[:, None])  # row t, row j, those between
    signed, together = (np.asarray(x) for x in base_masks(CHUNK, bits))
    # A write's exponent about the middle is minus that of a read in its place and minus its own.
    spans = signed[:, None, :] - signed[None, :, :] - np.eye(CHUNK)[None]
    np.testing.assert_array_equal(spans[together], between[together])
    met = together.astype(int)
    for level in range(bits, num_levels(CHUNK)):
        covers, links = (np.asarray(x) for x in level_masks(CHUNK, level))
        spans = covers[:, None, :].astype(int) + covers[None, :, :]
        np.testing.assert_array_equal(spans[links], between[links])
        met += links
    np.testing.assert_array_equal(met, np.tril(np.ones_like(met), -1))


@pytest.mark.parametrize(("operands", "limit"), [("float32", 1e-6), ("bfloat16", 1e-5)])
def test_sums_of_rows_keep_more_than_their_operands(operands, limit):
    x = make("mild")[2]
    got = masked_sum(jnp.tri(CHUNK), pieces(jnp.asarray(x), jnp.dtype(operands)))
    np.testing.assert_allclose(got, np.cumsum(x.astype(np.float64), axis=0), rtol=limit)
