"""Chunks whose state decays at another rate in every key channel: factors, and scores of pairs.

With log decays g [C, K] of a chunk's rows and G their running sum, a row that reads what an earlier
row has written sees every channel i decayed by e^{G_t,i − G_j,i}:

    score_tj = Σ_i read_t,i write_j,i e^{G_t,i − G_j,i}        j <= t

Factored as (read e^G) (write e^−G)ᵀ this overflows under strong decay, and a difference of rounded
sums loses small decays behind a large one. Here a pair is factored about a row between the two: at
level s = 1, 2, 4, ... rows lie in blocks of s, and rows of every odd block read those of the even
block before it,

    (read_t e^{sum of g from the odd block's start to t})
        · (write_j e^{sum of g from after j to the even block's end})

Every pair j < t meets at exactly one level. Both exponents are sums of numbers <= 0, built by
adding, never by subtracting: nothing overflows, nothing cancels, and a decay of zero (a segment's
border, see `with_borders`) cuts exactly, with finite gradients. Autodiff of these functions keeps
the same virtues, a log decay's gradient being a sum over the factors that cover it; what it keeps
in between are the functions' arguments.

Used by linear attention with one decay a channel, KDA and the DPLR delta rule:

    factors = decay_factors(g)                       # e^G and the like, for reads of the state
    scores = pair_scores(reads, writes, g, ...)      # [..., R, W, C, C], lower triangular

both over any leading axes, for all chunks at once; gradients with `jax.vjp`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.chunk_math import dot
from kernels_pallas.gated_delta_rule.gates import is_border

ELEMENTWISE = 4  # blocks up to this size are multiplied and summed; larger ones are products


def lowest(dtype: jnp.dtype) -> float:
    """Returns a log decay whose factor is exactly 0: -120, or -800 in float64."""
    return -120.0 if jnp.finfo(dtype).bits == 32 else -800.0


def with_borders(
    g: Float[Array, "B T HV K"],
    segment_ids: Int[Array, "B T"] | None,
    ordinals: Int[Array, "B T"] | None = None,
    before: Int[Array, " B"] | None = None,
) -> Float[Array, "B T HV K"]:
    """Puts segments and padding into log decays, after which chunks need not know of them.

    Args:
      g: log decays, float32 or float64.
      segment_ids: 0 for padding, or None.
      ordinals: number of each token's segment in its row, where the row goes on over several
        devices; None counts from this row's start.
      before: number of the segment before the first token; None is 0, that of an initial state.

    Returns:
      g with a decay of exactly zero where a segment other than the row's first one begins, none at
      padding, and nothing under `lowest`, so that sums stay finite.
    """
    floor = lowest(g.dtype)
    g = jnp.maximum(g, floor)
    if segment_ids is None:
        return g
    g = jnp.where((segment_ids != 0)[..., None, None], g, 0.0)
    return jnp.where(is_border(segment_ids, ordinals, before)[..., None, None], floor, g)


class Spans(NamedTuple):
    """Sums of log decays inside blocks of s rows, [*N, C/s, s, K]; sums of nothing are 0."""

    through: jax.Array  # from the block's start to the row, the row's own included
    before: jax.Array  # from the block's start to the row before
    after: jax.Array  # from the row after to the block's end
    whole: jax.Array  # all of the block, [*N, C/s, 1, K]


def spans(g: Float[Array, "*N C K"], block: int) -> Spans:
    """Sums log decays inside blocks of `block` rows, a power of two."""
    row = g[..., :, None, :]
    sums = Spans(row, jnp.zeros_like(row), jnp.zeros_like(row), row)
    while sums.through.shape[-2] < block:
        pairs = [x.reshape(*x.shape[:-3], -1, 2, *x.shape[-2:]) for x in sums]
        first, second = (Spans(*(x[..., i, :, :] for x in pairs)) for i in (0, 1))
        sums = Spans(
            jnp.concatenate([first.through, first.whole + second.through], axis=-2),
            jnp.concatenate([first.before, first.whole + second.before], axis=-2),
            jnp.concatenate([first.after + second.whole, second.after], axis=-2),
            first.whole + second.whole,
        )
    return sums


class Factors(NamedTuple):
    """Decay factors between a chunk's rows and its ends."""

    from_start: Float[Array, "*N C K"]  # e^{G_t}: of the state before the chunk as row t sees it
    before: Float[Array, "*N C K"]  # e^{G_t-1}: as row t sees it before its own decay
    to_end: Float[Array, "*N C K"]  # e^{G_C − G_j}: of row j's writing after the chunk
    whole: Float[Array, "*N K"]  # e^{G_C}


@jax.checkpoint
def decay_factors(g: Float[Array, "*N C K"]) -> Factors:
    """Computes a chunk's decay factors; C is a power of two."""
    sums = spans(g, g.shape[-2])
    through, before, after, whole = (jnp.exp(x[..., 0, :, :]) for x in sums)
    return Factors(through, before, after, whole[..., 0, :])


def pair_scores(
    reads: Float[Array, "*N R C K"],
    writes: Float[Array, "*N W C K"],
    g: Float[Array, "*N C K"],
    *,
    before: Sequence[bool] = (False,),
    operands: jnp.dtype,
) -> Float[Array, "*N R W C C"]:
    """Computes the scores of all pairs of rows.

    Args:
      reads: R kinds of rows that read (queries; keys of the delta rule).
      writes: W kinds of rows that write.
      g: log decays, at most 0 and finite (`with_borders`); C is a power of two.
      before: for each kind of reads, whether it sees the state before its own row's decay: the
        exponent is G_{t-1} − G_j then, and the diagonal 0, which is read_t·write_t otherwise. A
        border's decay does not cut such a read of its own row: it has to be 0 there (`is_border`).
      operands: dtype that products' operands are rounded to; sums are float32 or float64.

    Returns:
      score_tj of each kind of reads with each of writes, zero for j > t.
    """
    return _pair_scores(reads, writes, g, tuple(before), jnp.dtype(operands))


@functools.partial(jax.checkpoint, static_argnums=(3, 4))
def _pair_scores(reads, writes, g, before, operands):
    size = g.shape[-2]
    diagonal = jnp.sum(reads[..., :, None, :, :] * writes[..., None, :, :, :], axis=-1)
    sees_own = ~np.asarray(before)[:, None, None]
    x = jnp.where(sees_own, diagonal, 0)[..., None, None]  # [..., C/s, s, s] with s = 1
    block = 1
    while block < size:
        link = _link(reads, writes, g, block, before, operands)
        x = x.reshape(*x.shape[:-3], -1, 2, block, block)
        upper, lower = x[..., 0, :, :], x[..., 1, :, :]
        x = jnp.block([[upper, jnp.zeros_like(upper)], [link, lower]])
        block *= 2
    return x[..., 0, :, :]


@functools.partial(jax.checkpoint, static_argnums=(3, 4, 5))
def _link(reads, writes, g, block, before, operands):
    """Returns scores of odd blocks' reads with the even blocks before them, [*N R W M s s]."""
    sums = spans(g, block)

    def half(x, odd):  # every second block
        x = x.reshape(*x.shape[:-2], -1, 2, block, x.shape[-1])
        return x[..., odd, :, :]

    def sums_half(x, odd):
        return half(x.reshape(g.shape), odd)

    through, prior, after = (
        sums_half(sums.through, 1),
        sums_half(sums.before, 1),
        sums_half(sums.after, 0),
    )
    to_row = jnp.exp(jnp.stack([prior if is_before else through for is_before in before], axis=-4))
    read = half(reads, 1) * to_row
    write = half(writes, 0) * jnp.exp(after)[..., None, :, :, :]
    if block <= ELEMENTWISE:
        return jnp.sum(
            read[..., :, None, :, :, None, :] * write[..., None, :, :, None, :, :], axis=-1
        )
    return dot("...rmik,...wmjk->...rwmij", read, write, operands)
