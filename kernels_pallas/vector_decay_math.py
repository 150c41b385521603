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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.backend import NN, NT, TN, matmul
from kernels_pallas.gated_delta_rule.kernel_math import indices


def split_high_low(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits float32 into two bfloat16 that add up to it but for 2^-17 of it."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def sum_rows(mask: jax.Array, x: jax.Array) -> jax.Array:
    """Sums for every row t the rows of x that mask[t] selects.

    Args:
      mask: [C, C] zeros and ones. In bfloat16 x is split in two and summed to 1e-5; in float32 to
        float32 accuracy.
      x: [C, k] float32.

    Returns:
      [C, k] float32.
    """
    if mask.dtype == jnp.float32:
        return matmul(mask, x)
    high, low = split_high_low(x)
    return matmul(mask, low) + matmul(mask, high)


class Masks(NamedTuple):
    """Which rows a factor spans: zeros and ones, [C, C], of a row's factor by the rows it sums.

    The same structure holds arrays, references to them in a kernel, and block specs: made once
    outside the kernel they cost a load, made inside they would cost its registers.
    """

    through: Any  # of e^{G_t}: row t spans i <= t
    through_by: Any  # its transpose
    after: Any  # of e^{G_C − G_j}: row j spans i > j
    after_by: Any
    covers: Any  # M of all levels, [log2 C, C, C]
    covers_by: Any
    pairs: Any  # 1 where row t reads at this level what row j has written, likewise


def decay_masks(size: int, dtype: jnp.dtype, *, before: bool = False) -> Masks:
    """Makes the masks of chunks of `size` rows, a power of two.

    Args:
      size: C.
      dtype: dtype of the products' operands.
      before: for reads that see the state before their own row's decay (i < t where a row reads).
    """
    t, i = np.ogrid[:size, :size]
    until = i < t if before else i <= t
    covers, pairs = [], []
    for level in range(size.bit_length() - 1):
        same, odd = (t >> level) == (i >> level), ((t >> level) & 1) == 1
        covers.append(same & np.where(odd, until, i > t))
        pairs.append(((t >> level) == (i >> level) + 1) & odd)
    transposed = [x.T for x in covers]
    masks = Masks(until, until.T, i > t, i < t, *map(np.stack, (covers, transposed, pairs)))
    return Masks(*(jnp.asarray(x, dtype) for x in masks))


class Ends(NamedTuple):
    """Factors between rows and the chunk's ends, [C, k] and [1, k] float32."""

    from_start: jax.Array
    to_end: jax.Array
    whole: jax.Array


def end_factors(g: jax.Array, masks: Masks) -> Ends:
    """Computes e^{G_t}, e^{G_C − G_j} and e^{G_C} of log decays [C, k] float32."""
    return Ends(
        jnp.exp(sum_rows(masks.through[...], g)),
        jnp.exp(sum_rows(masks.after[...], g)),
        jnp.exp(jnp.sum(g, axis=0)[None, :]),
    )


def channel_scores(q: jax.Array, k: jax.Array, g: jax.Array, masks: Masks) -> jax.Array:
    """Computes some channels' share of the scores q_tᵀ e^{G_t − G_j} k_j, j <= t.

    Args:
      q: query rows [C, k] float32.
      k: key rows likewise.
      g: log decays likewise.
      masks: of the chunk, in the dtype of the products' operands.

    Returns:
      [C, C] float32, zero above the diagonal.
    """
    i, j = indices(g.shape[0])

    def add(level, total):
        factor = jnp.exp(sum_rows(masks.covers[level], g))
        pairs = masks.pairs[level]
        products = matmul((q * factor).astype(pairs.dtype), (k * factor).astype(pairs.dtype), NT)
        return total + products * pairs.astype(jnp.float32)

    own = jnp.where(i == j, jnp.sum(q * k, axis=1)[:, None], 0.0)
    return jax.lax.fori_loop(0, masks.covers.shape[0], add, own)


class ChannelGradients(NamedTuple):
    """Gradients of some channels of a chunk, [C, k] float32."""

    q: jax.Array
    k: jax.Array
    g: jax.Array


def channel_gradients(
    rows: Callable[[], tuple[jax.Array, jax.Array, jax.Array]],
    dscores: jax.Array,
    dread: jax.Array,
    dwrite: jax.Array,
    dwhole: jax.Array,
    masks: Masks,
) -> ChannelGradients:
    """Computes the gradients of some channels' queries, keys and log decays.

    A log decay's gradient sums the gradients of the logarithms of all factors that span its row.

    Args:
      rows: gives queries, keys and log decays [C, k] float32; called at every level, so that a
        kernel need not hold them.
      dscores: gradient of the scores [C, C], zero above the diagonal, in the operands' dtype.
      dread: gradient of q e^G, [C, k] float32.
      dwrite: gradient of k e^{G_C − G}, likewise.
      dwhole: gradient of e^{G_C}, [1, k] float32.
      masks: of the chunk, in the dtype of the products' operands.
    """
    i, j = indices(dscores.shape[0])
    own = jnp.where(i == j, dscores.astype(jnp.float32), 0.0)
    own = jnp.sum(own, axis=1)[:, None]
    q, k, g = rows()
    ends = end_factors(g, masks)
    dq, dk = ends.from_start * dread, ends.to_end * dwrite
    dg = sum_rows(masks.through_by[...], q * dq) + sum_rows(masks.after_by[...], k * dk)
    sums = dq + own * k, dk + own * q, dg + ends.whole * dwhole

    def add(level, sums):
        dq, dk, dg = sums
        q, k, g = rows()
        factor = jnp.exp(sum_rows(masks.covers[level], g))
        pairs = masks.pairs[level] * dscores
        by_q = factor * matmul(pairs, (k * factor).astype(pairs.dtype), NN)
        by_k = factor * matmul(pairs, (q * factor).astype(pairs.dtype), TN)
        dg = dg + sum_rows(masks.covers_by[level], q * by_q + k * by_k)
        return dq + by_q, dk + by_k, dg

    return ChannelGradients(*jax.lax.fori_loop(0, masks.covers.shape[0], add, sums))
