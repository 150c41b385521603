"""Kernels of one decay a key channel: terms of all chunks, and the gradients of q, k and g.

    Q̂ = scale q e^G    K_e = k e^{G_C − G}    Y_tj = scale q_tᵀ e^{G_t − G_j} k_j, j <= t

and from X = dO Vᵀ, dQ̂ = dO Sᵀ, dK_e = V dS'ᵀ and the gradient rowsum(S ∘ dS') of e^{G_C}, those of
q, k and g (vector_decay_math.py has both). One program takes one chunk of one value head on a GPU,
eight on a TPU, and K a few channels at a time, which bounds what is held in registers: the channels
meet only in the sum that is Y.

Read by the terms: q, k and g (8 bytes a channel and token in bfloat16); written: Q̂ and K_e (4) and
Y (128 a token and head). Arithmetic: for each of the 6 levels two products of [C, C] with [C, K]
and one over K, so the tensor cores have more to do here than the memory. The gradients read dO, V,
S and dS' besides, dO and V from L2 for all channels but the first.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, loop, matmul
from kernels_pallas.gated_delta_rule.kernel_math import indices, to_column
from kernels_pallas.gated_delta_rule.layout import Layout, row_shape, span
from kernels_pallas.half_chunks import FASTEST_FIRST, HalfChunks
from kernels_pallas.linear_attention.blocks import CHUNK, Blocks
from kernels_pallas.linear_attention.kernel_terms import Terms
from kernels_pallas.pair_gradients import pair_gradients
from kernels_pallas.vector_decay_gradients import Gradients, tile_gradients
from kernels_pallas.vector_decay_math import add_scores, chunk_bits, end_factors


def _terms_body(q_ref, k_ref, g_ref, out: Terms, *, chunks, channels, scale):
    operands = q_ref.dtype

    def chunk(n, carry):
        rows = span(n, CHUNK)
        i, j = indices(CHUNK)
        bits = chunk_bits(g_ref, rows, channels, CHUNK, operands)

        def add(step, scores):
            part = span(step, channels)
            q, k = (ref[rows, part].astype(jnp.float32) for ref in (q_ref, k_ref))
            q, g = q * scale, g_ref[rows, part]
            scores = scores + jnp.where(i == j, jnp.sum(q * k, axis=1)[:, None], 0.0)
            q, ends = q * jnp.exp(g), end_factors(g, operands)
            out.read[rows, part] = (q * ends.before).astype(out.read.dtype)
            out.write[rows, part] = (k * ends.after).astype(out.write.dtype)
            out.whole[pl.ds(n, 1), part] = ends.whole
            return add_scores(((scores,),), (q,), (k,), g, bits, operands)[0][0]

        scores = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        scores = loop(q_ref.shape[-1] // channels, add, scores)
        out.scores[rows, :] = scores.astype(out.scores.dtype)
        return carry

    loop(chunks, chunk, 0)


def channel_terms(
    q: jax.Array, k: jax.Array, g: jax.Array, *, scale: float, blocks: Blocks
) -> Terms:
    """Computes every chunk's `Terms`.

    Args:
      q: queries in the kernels' layout.
      k: keys likewise.
      g: log decays likewise, float32.
      scale: factor on the queries.
      blocks: sizes.
    """
    batch, heads, length, width, layout, n = _sizes(q, g, blocks)
    keys, own = layout.rows(n * CHUNK, width, value_head=False), layout.rows(n * CHUNK, width)
    rows = row_shape(batch, length, heads, width, q.dtype)
    scores = jax.ShapeDtypeStruct((batch, heads, length, CHUNK), q.dtype)
    whole = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, width), jnp.float32)
    matrix, row = layout.per_chunk(n * CHUNK, CHUNK), layout.per_chunk(n, width)
    (out,) = backend.pallas(
        functools.partial(_terms_body, chunks=n, channels=blocks.channels or width, scale=scale),
        name="linear_attention_channel_terms",
        grid=(batch, heads, length // (n * CHUNK)),
        in_specs=[keys, keys, own],
        out_specs=[Terms(own, None, own, None, matrix, row)],
        out_shape=[Terms(rows, None, rows, None, scores, whole)],
        fastest_first=(1, 2, 0),
        num_warps=blocks.terms[0],
        num_stages=blocks.terms[1],
    )(q, k, g)
    return out


def _sizes(q: jax.Array, g: jax.Array, blocks: Blocks):
    on_tpu = backend.platform() == "tpu"
    batch, first, second, width = g.shape
    heads, length = (first, second) if on_tpu else (second, first)
    layout = Layout(heads // q.shape[1 if on_tpu else 2], lambda i: i)
    return batch, heads, length, width, layout, blocks.chunks


class ChannelOutputs(NamedTuple):
    """Gradients for each value head, in the kernels' layout."""

    q: Any
    k: Any
    g: Any
    beyond: Any  # what is to be added to g: see `half_chunks.with_beyond`


def _gradients_body(
    half_ref, own, other, below, own_ref, v_ref, do_ref, states_ref, dstates_ref, out, **sizes
):
    chunks, size, v_step, scale = (sizes[x] for x in ("chunks", "size", "v_step", "scale"))
    steps, operands, part = v_ref.shape[-1] // v_step, v_ref.dtype, states_ref.shape[-1]

    def chunk(n, carry):
        rows, row = span(n, size), (pl.ds(n, 1), slice(None))
        at = rows, slice(None)

        def add_states(step, sums):
            reads, writes, inner = sums
            columns = span(step, v_step)
            state, dstate = states_ref[n, columns, :], dstates_ref[n, columns, :]
            products = state.astype(jnp.float32) * dstate.astype(jnp.float32)
            return (
                reads + matmul(do_ref[rows, columns], state, NN),
                writes + matmul(v_ref[rows, columns], dstate, NN),
                inner + jnp.sum(products, axis=0)[None, :],
            )

        zeros = jnp.zeros((size, part), jnp.float32)
        sums = zeros, zeros, jnp.zeros((1, part), jnp.float32)
        reads, writes, inner = loop(steps, add_states, sums)

        def given(refs):
            q, k = (ref[at].astype(jnp.float32) for ref in refs[:2])
            return q * scale, k, refs[2][at]

        def scaled(refs):
            q, k, g = given(refs)
            return (q * jnp.exp(g),), (k,), g

        found, beyond = tile_gradients(
            lambda: scaled(own),
            None if other is None else lambda: scaled(other),
            lambda *meeting: jax.tree.map(lambda ref: ref[at], below[meeting]),
            Gradients((reads,), (writes,), zeros),
            inner,
            half_ref is not None and half_ref[0] == 1,
            chunk_bits(own[2], rows, part, size, operands),
            operands,
        )
        q, k, g = given(own)
        dq, own_pair = jnp.exp(g) * found.reads[0], to_column(own_ref[row])
        out.q[at] = ((dq + own_pair * k) * scale).astype(out.q.dtype)
        out.k[at] = (found.writes[0] + own_pair * q).astype(out.k.dtype)
        out.g[at] = found.g + q * dq
        if beyond is not None:
            out.beyond[row] = beyond
        return carry

    loop(chunks, chunk, 0)


def channel_kernel_gradients(
    q: jax.Array,
    k: jax.Array,
    g: jax.Array,
    v: jax.Array,
    do: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    *,
    scale: float,
    blocks: Blocks,
    dtype: Any,
) -> ChannelOutputs:
    """Computes the gradients of q, k and g for each value head.

    Args:
      q: queries in the kernels' layout.
      k: keys likewise.
      g: log decays likewise, float32.
      v: values likewise.
      do: gradient of o likewise.
      states: transposed states before each chunk [B, HV, N, V, K].
      dstates: gradients of the transposed states after each chunk, likewise.
      scale: factor on the queries.
      blocks: sizes.
      dtype: of the gradients of q and k.
    """
    batch, heads, length, key_width, layout, n = _sizes(q, g, blocks)
    width, v_step, part = states.shape[3], blocks.v_step, blocks.channels or key_width
    pairs = pair_gradients(
        (do,),
        (v,),
        (1,),
        name="linear_attention_channel_pairs",
        chunk_size=CHUNK,
        chunks=n,
        v_step=v_step,
        schedule=blocks.gradients,
    )
    cut = HalfChunks(CHUNK, n, part, layout.group)

    def rows_of(own):
        keys = cut.rows(part, own=own, is_part=True, value_head=False)
        return keys, keys, cut.rows(part, own=own, is_part=True)

    is_cut = cut.halves > 1
    meetings = [(False, False)] + [(False, True), (True, False)] * is_cut
    below = {(r, w): (((cut.matrix(reads=not r, writes=not w),),),) for r, w in meetings}
    own, values, state = cut.rows(part, is_part=True), cut.rows(width), cut.state(width)
    rows = row_shape(batch, length, heads, key_width, dtype)
    decays = row_shape(batch, length, heads, key_width, jnp.float32)
    beyond = (batch, heads, length // CHUNK * cut.halves, key_width)
    number, number_spec = cut.number()
    (out,) = backend.pallas(
        functools.partial(
            _gradients_body, chunks=n, size=cut.size, v_step=v_step or width, scale=scale
        ),
        name="linear_attention_channel_gradients",
        grid=cut.grid(batch, heads, length // CHUNK, key_width),
        in_specs=[
            number_spec,
            rows_of(True),
            rows_of(False) if is_cut else None,
            below,
            cut.lanes(),
            *(values, values, state, state),
        ],
        out_specs=[ChannelOutputs(own, own, own, cut.columns() if is_cut else None)],
        out_shape=[
            ChannelOutputs(
                *(rows, rows, decays),
                jax.ShapeDtypeStruct(beyond, jnp.float32) if is_cut else None,
            )
        ],
        fastest_first=FASTEST_FIRST,
        num_warps=blocks.channel_gradients[0],
        num_stages=blocks.channel_gradients[1],
    )(
        number,
        (q, k, g),
        (q, k, g) if is_cut else None,
        dict.fromkeys(meetings, pairs.below),
        pairs.own[0][0],
        *(v, do, states, dstates),
    )
    return out
