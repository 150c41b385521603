"""Linear attention a chunk at a time: what one chunk alone determines.

With G the running sum of g inside a chunk, C its last row and S the state before it, rows of one
head obey

    O = Q̂ S + Y V                  S' = e^{G_C} S + K_eᵀ V
    Q̂_t = scale e^{G_t} q_t        Y_tj = scale q_tᵀ e^{G_t − G_j} k_j, j <= t
    K_e,j = e^{G_C − G_j} k_j

With one decay a head all three are scalings of rows and of QKᵀ, so that heads which share queries
and keys share those; with one a key channel they are rows and scores of their own (vector_decay.py)
and a head shares nothing. Both are brought into one form, `Terms`: groups of R heads that share
rows, with R = 1 in the second case. `Terms` are plain functions of q, k and g, through which
autodiff takes gradients back.

Segments and padding are in the decays: a border is a decay of exactly zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.chunk_math import (
    Decay,
    decay_factors,
    decay_gradient,
    dot,
)
from kernels_pallas.gated_delta_rule.chunks import to_chunks
from kernels_pallas.gated_delta_rule.inputs import repeat_heads
from kernels_pallas.vector_decay import decay_factors as channel_factors
from kernels_pallas.vector_decay import pair_scores, with_borders


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    chunk: int  # C
    heads: int  # HV
    operands: jnp.dtype  # what the products' operands are rounded to
    dtype: jnp.dtype  # of sums and of the state


class Terms(NamedTuple):
    """What a chunk alone determines, for G groups of R heads with shared rows."""

    read: Float[Array, "N B G C K"]
    read_factor: Float[Array, "N B G R C"] | None  # Q̂ = factor · read; None is 1
    write: Float[Array, "N B G C K"]
    write_factor: Float[Array, "N B G R C"] | None  # K_e = factor · write; None is 1
    scores: Any  # Y [N B G R C C]; None where only the rest is needed
    whole: Float[Array, "N B G R #K"]  # e^{G_C}


@jax.custom_vjp
def head_factors(g: Float[Array, "*N C"]) -> Decay:
    """`decay_factors` with the derivative that does not cancel under strong decay."""
    return decay_factors(g, None, None)


def _head_factors_forward(g):
    decay = decay_factors(g, None, None)
    return decay, decay


def _head_factors_backward(decay: Decay, cotangent: Decay):
    of_log = jax.tree.map(jnp.multiply, decay, cotangent)
    return (decay_gradient(*of_log),)


head_factors.defvjp(_head_factors_forward, _head_factors_backward)


def _head_terms(options: Options, segment_ids, q, k, g) -> Terms:
    g = with_borders(g[..., None].astype(options.dtype), segment_ids)[..., 0]
    g = to_chunks(g, options.chunk, None)
    q, k = (to_chunks(x.astype(options.dtype), options.chunk, segment_ids) for x in (q, k))
    decay = head_factors(by_group(g, q.shape[2]))
    products = dot("...ik,...jk->...ij", q, k, options.operands)
    scores = options.scale * products[:, :, :, None] * decay.between
    read_factor = options.scale * decay.from_start
    return Terms(q, read_factor, k, decay.to_end, scores, decay.whole[..., None])


def _channel_terms(options: Options, segment_ids, q, k, g) -> Terms:
    g = to_chunks(with_borders(g.astype(options.dtype), segment_ids), options.chunk, None)
    q, k = (
        to_chunks(repeat_heads(x.astype(options.dtype), options.heads), options.chunk, segment_ids)
        for x in (q, k)
    )
    q = options.scale * q
    decay = channel_factors(g)
    scores = pair_scores(q[..., None, :, :], k[..., None, :, :], g, operands=options.operands)
    return Terms(
        q * decay.from_start,
        None,
        k * decay.to_end,
        None,
        scores[..., 0, :, :],
        decay.whole[..., None, :],
    )


def terms_of(
    options: Options, segment_ids: Int[Array, "B T"] | None, has_channels: bool
) -> Callable[..., Terms]:
    """Returns the function of q, k and g [B T HV] or [B T HV K] that gives `Terms`."""
    make = _channel_terms if has_channels else _head_terms
    return lambda q, k, g: make(options, segment_ids, q, k, g)


def by_group(x: Float[Array, "N B HV *D"], groups: int) -> Float[Array, "N B G R *D"]:
    """Splits heads into groups that share rows."""
    return x.reshape(*x.shape[:2], groups, -1, *x.shape[3:])


def by_head(x: Float[Array, "N B G R *D"]) -> Float[Array, "N B HV *D"]:
    """Joins the groups again."""
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
