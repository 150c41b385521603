"""Decays of a key channel each, as kernels compute them: pure functions of one chunk's values.

The levels of vector_decay.py with whole [C, C] and [C, k] values, which neither Triton nor Mosaic
can slice. At level l = 0, 1, ... rows lie in blocks of 2^l, and one matrix of factors serves both
sides of a pair, since rows of odd blocks only read and those of even blocks only write there:

    F = e^{M g}    M_ti = 1 where row i is in t's block and, t's block being odd: i <= t
                                                            even: i > t
    score = Σ over levels of  [pair (t, j) meets here] ∘ (read F) (write F)ᵀ,  and the diagonal

M g is a product with zeros and ones, so nothing is subtracted and nothing cancels. Columns of K do
not depend on each other but for the sum over them in the scores: a kernel takes a few at a time.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NN, NT, TN, matmul
from kernels_pallas.gated_delta_rule.kernel_math import indices


def split_high_low(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into two bfloat16 that add up to it but for 2^-17 of it."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def sum_rows(mask: jax.Array, x: jax.Array, operands: jnp.dtype) -> jax.Array:
    """Sums for every row t the rows of x that mask[t] selects.

    Args:
      mask: [C, C] boolean.
      x: [C, k] float32.
      operands: dtype of the chunk's other products: with bfloat16, x is split in two and summed to
        1e-5; with float32, to float32 accuracy.

    Returns:
      [C, k] float32.
    """
    ones = jnp.where(mask, 1.0, 0.0)
    if operands == jnp.float32:
        return matmul(ones, x)
    ones = ones.astype(jnp.bfloat16)
    high, low = split_high_low(x)
    return matmul(ones, low) + matmul(ones, high)


class Level(NamedTuple):
    """Which rows belong together at one level, [C, C] boolean."""

    covers: jax.Array  # row t's factor spans row i
    covered_by: jax.Array  # its transpose
    pairs: jax.Array  # row t reads here what row j has written


def level_of(size: int, level: jax.Array | int, *, before: bool = False) -> Level:
    """Makes the masks of a level, whose blocks have 2^level rows.

    Args:
      size: C.
      level: 0 to log2(C) - 1, may be traced.
      before: for reads that see the state before their own row's decay (i < t where rows read).
    """
    i, j = indices(size)

    def covers(t, i):
        same, odd = (t >> level) == (i >> level), ((t >> level) & 1) == 1
        until = i < t if before else i <= t
        return same & ((odd & until) | (~odd & (i > t)))

    pairs = ((i >> level) == (j >> level) + 1) & (((i >> level) & 1) == 1)
    return Level(covers(i, j), covers(j, i), pairs)


def levels(size: int) -> int:
    """Returns the number of levels of C rows, a power of two."""
    return size.bit_length() - 1


class Ends(NamedTuple):
    """Factors between rows and the chunk's ends, [C, k] and [1, k] float32."""

    from_start: jax.Array
    to_end: jax.Array
    whole: jax.Array


def end_factors(g: jax.Array, operands: jnp.dtype) -> Ends:
    """Computes e^{G_t}, e^{G_C − G_j} and e^{G_C} of log decays [C, k]."""
    i, j = indices(g.shape[0])
    return Ends(
        jnp.exp(sum_rows(j <= i, g, operands)),
        jnp.exp(sum_rows(j > i, g, operands)),
        jnp.exp(jnp.sum(g, axis=0)[None, :]),
    )


def channel_scores(q: jax.Array, k: jax.Array, g: jax.Array, operands: jnp.dtype) -> jax.Array:
    """Computes some channels' share of the scores q_tᵀ e^{G_t − G_j} k_j, j <= t.

    Args:
      q: query rows [C, k] float32.
      k: key rows likewise.
      g: log decays likewise.
      operands: dtype of the products' operands.

    Returns:
      [C, C] float32, zero above the diagonal.
    """
    size = g.shape[0]
    i, j = indices(size)

    def add(level, total):
        at = level_of(size, level)
        factor = jnp.exp(sum_rows(at.covers, g, operands))
        products = matmul((q * factor).astype(operands), (k * factor).astype(operands), NT)
        return total + jnp.where(at.pairs, products, 0.0)

    own = jnp.where(i == j, jnp.sum(q * k, axis=1)[:, None], 0.0)
    return jax.lax.fori_loop(0, levels(size), add, own)


class ChannelGradients(NamedTuple):
    """Gradients of some channels of a chunk, [C, k] float32."""

    q: jax.Array
    k: jax.Array
    g: jax.Array


def channel_gradients(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array,
    dscores: jax.Array,
    dread: jax.Array,
    dwrite: jax.Array,
    dwhole: jax.Array,
    operands: jnp.dtype,
) -> ChannelGradients:
    """Computes the gradients of some channels' queries, keys and log decays.

    A log decay's gradient sums the gradients of the logarithms of all factors that span its row.

    Args:
      q: query rows [C, k] float32.
      k: key rows likewise.
      g: log decays likewise.
      dscores: gradient of the scores [C, C] float32; not used above the diagonal.
      dread: gradient of q e^G, [C, k] float32.
      dwrite: gradient of k e^{G_C − G}, likewise.
      dwhole: gradient of e^{G_C}, [1, k] float32.
      operands: dtype of the products' operands.
    """
    size = g.shape[0]
    i, j = indices(size)
    ends = end_factors(g, operands)
    own = jnp.sum(jnp.where(i == j, dscores, 0.0), axis=1)[:, None]
    dq, dk = ends.from_start * dread, ends.to_end * dwrite
    # Row l lies in the span of e^{G_t} for t >= l, and in that of e^{G_C − G_j} for j < l.
    dg = sum_rows(j >= i, q * dq, operands) + sum_rows(j < i, k * dk, operands)
    sums = dq + own * k, dk + own * q, dg + ends.whole * dwhole

    def add(level, sums):
        dq, dk, dg = sums
        at = level_of(size, level)
        factor = jnp.exp(sum_rows(at.covers, g, operands))
        pairs = jnp.where(at.pairs, dscores, 0.0).astype(operands)
        by_q = factor * matmul(pairs, (k * factor).astype(operands), NN)
        by_k = factor * matmul(pairs, (q * factor).astype(operands), TN)
        dg = dg + sum_rows(at.covered_by, q * by_q + k * by_k, operands)
        return dq + by_q, dk + by_k, dg

    return ChannelGradients(*jax.lax.fori_loop(0, levels(size), add, sums))
