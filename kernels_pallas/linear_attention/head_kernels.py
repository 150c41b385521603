"""Kernels of one decay a head: the scores of all chunks, and the gradients of q, k and g.

    Y = scale QKᵀ ∘ D        D_ij = e^{G_i − G_j}, i >= j
    X = dO Vᵀ                G = scale X ∘ D
    a = h (dO Sᵀ)            dQ = a + G K
    c = ε (V dS'ᵀ)           dK = c + Gᵀ Q

with h = scale e^{G_i} and ε = e^{G_C − G_j}. A log decay's gradient sums the gradients of the
logarithms of all factors that span its row: G ∘ QKᵀ of the pairs around it, q·a of the rows from it
on, k·c of those before it, and e^{G_C} <S, dS'>. The sum over pairs is taken from their row and
column sums without the diagonal, which would cancel.

One program takes one chunk of one value head on a GPU, eight on a TPU. The gradient kernel goes
over V in a loop, `v_step` columns at a time. Read by it: dO, V, S and dS', 6.1 KB a token and head
at K = 192, V = 384 in bfloat16, which makes it bound by memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, NT, TN, matmul
from kernels_pallas.gated_delta_rule.kernel_math import (
    Parts,
    add_up,
    between,
    indices,
    to_column,
    to_row,
)
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span
from kernels_pallas.linear_attention.blocks import CHUNK, Blocks


class DecayRows(NamedTuple):
    """Decays of every chunk, [B, HV, N, C] float32; in a kernel references to a chunk's or more."""

    coarse: Any  # running sum of the decays' coarse parts (gates.py)
    fine: Any  # running sum of the rests
    from_start: Any  # e^{G_i}
    to_end: Any  # e^{G_C − G_j}


def _products(q: Parts, k: Parts) -> jax.Array:
    return add_up(matmul(a, b, NT) for a, b in zip(q, k, strict=True))


def _scores_body(q_ref, k_ref, coarse_ref, fine_ref, out_ref, *, chunks, parts, scale):
    def chunk(i, carry):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        products = _products(load(q_ref, rows, parts), load(k_ref, rows, parts))
        scores = products * (scale * between(coarse_ref[row, :], fine_ref[row, :]))
        out_ref[rows, :] = scores.astype(out_ref.dtype)
        return carry

    backend.loop(chunks, chunk, 0)


def head_scores(
    q: jax.Array, k: jax.Array, decays: DecayRows, *, scale: float, blocks: Blocks
) -> jax.Array:
    """Computes Y [B, HV, T, C] in q's dtype.

    Args:
      q: queries in the kernels' layout.
      k: keys likewise.
      decays: of all chunks.
      scale: factor on the queries.
      blocks: sizes.
    """
    batch, heads, count, _ = decays.coarse.shape
    key_heads = q.shape[1 if backend.platform() == "tpu" else 2]
    n, width = blocks.chunks, q.shape[-1]
    layout = Layout(heads // key_heads, lambda i: i)
    rows = layout.rows(n * CHUNK, width, value_head=False)
    row = layout.per_chunk(n, CHUNK)
    return backend.pallas(
        functools.partial(_scores_body, chunks=n, parts=column_parts(width), scale=scale),
        name="linear_attention_scores",
        grid=(batch, heads, count // n),
        in_specs=[rows, rows, row, row],
        out_specs=layout.per_chunk(n * CHUNK, CHUNK),
        out_shape=jax.ShapeDtypeStruct((batch, heads, count * CHUNK, CHUNK), q.dtype),
        fastest_first=(1, 2, 0),
        num_warps=blocks.terms[0],
        num_stages=blocks.terms[1],
    )(q, k, decays.coarse, decays.fine)


class HeadGradients(NamedTuple):
    """Gradients for each value head, and what the decays' gradients are summed up from."""

    q: Any  # in the kernels' layout
    k: Any
    pairs: Any  # row sums less column sums of the gradient of log D, [B, HV, N, C] float32
    from_start: Any  # gradient of log e^{G_i}, likewise
    to_end: Any  # gradient of log e^{G_C − G_j}, likewise
    inner: Any  # <S, dS'>, [B, HV, N, 1] float32


def _dot_rows(x: Parts, y: Parts) -> jax.Array:
    products = (jnp.sum(a.astype(jnp.float32) * b, axis=1) for a, b in zip(x, y, strict=True))
    return to_row(add_up(products)[:, None])


def _gradients_body(
    q_ref,
    k_ref,
    decay_refs,
    v_ref,
    do_ref,
    states_ref,
    dstates_ref,
    out: HeadGradients,
    *,
    chunks,
    parts,
    v_step,
    scale,
):
    steps = v_ref.shape[-1] // v_step

    def chunk(n, carry):
        rows, row = span(n, CHUNK), pl.ds(n, 1)

        def add(step, sums):
            pairs, reads, writes, inner = sums
            columns = span(step, v_step)
            do, v = do_ref[rows, columns], v_ref[rows, columns]
            state = tuple(states_ref[n, columns, part] for part in parts)
            dstate = tuple(dstates_ref[n, columns, part] for part in parts)
            for x, y in zip(state, dstate, strict=True):
                products = x.astype(jnp.float32) * y.astype(jnp.float32)
                inner = inner + jnp.sum(products, axis=1)[:, None]
            reads = tuple(x + matmul(do, y, NN) for x, y in zip(reads, state, strict=True))
            writes = tuple(x + matmul(v, y, NN) for x, y in zip(writes, dstate, strict=True))
            return pairs + matmul(do, v, NT), reads, writes, inner

        zeros = tuple(jnp.zeros((CHUNK, x.stop - x.start), jnp.float32) for x in parts)
        sums = jnp.zeros((CHUNK, CHUNK), jnp.float32), zeros, zeros
        sums = backend.loop(steps, add, (*sums, jnp.zeros((v_step, 1), jnp.float32)))
        pairs, reads, writes, inner = sums
        out.inner[row, :] = jnp.sum(inner, axis=0)[:, None]

        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)
        pairs = pairs * (scale * between(decay_refs.coarse[row, :], decay_refs.fine[row, :]))
        i, j = indices(CHUNK)
        of_log = jnp.where(i > j, pairs * _products(q, k), 0.0)
        out.pairs[row, :] = (
            to_row(jnp.sum(of_log, axis=1)[:, None]) - jnp.sum(of_log, axis=0)[None, :]
        )
        by_scores = pairs.astype(q[0].dtype)
        read_factor = scale * to_column(decay_refs.from_start[row, :])
        write_factor = to_column(decay_refs.to_end[row, :])
        reads = tuple(x * read_factor for x in reads)
        writes = tuple(x * write_factor for x in writes)
        out.from_start[row, :], out.to_end[row, :] = _dot_rows(q, reads), _dot_rows(k, writes)
        for part, x, y, a, b in zip(parts, reads, writes, q, k, strict=True):
            out.q[rows, part] = (x + matmul(by_scores, b, NN)).astype(out.q.dtype)
            out.k[rows, part] = (y + matmul(by_scores, a, TN)).astype(out.k.dtype)
        return carry

    backend.loop(chunks, chunk, 0)


def head_gradients(
    q: jax.Array,
    k: jax.Array,
    decays: DecayRows,
    v: jax.Array,
    do: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    *,
    scale: float,
    blocks: Blocks,
    dtype: Any,
) -> HeadGradients:
    """Computes the gradients of q and k for each value head, and the decays' summands.

    Args:
      q: queries in the kernels' layout.
      k: keys likewise.
      decays: of all chunks.
      v: values likewise.
      do: gradient of o likewise.
      states: transposed states before each chunk [B, HV, N, V, K].
      dstates: gradients of the transposed states after each chunk, likewise.
      scale: factor on the queries.
      blocks: sizes.
      dtype: of the gradients of q and k.
    """
    batch, heads, count, _ = decays.coarse.shape
    key_heads = q.shape[1 if backend.platform() == "tpu" else 2]
    key_width, width = q.shape[-1], states.shape[3]
    n = blocks.chunks
    layout = Layout(heads // key_heads, lambda i: i)
    keys = layout.rows(n * CHUNK, key_width, value_head=False)
    dkeys = layout.rows(n * CHUNK, key_width)
    values, row = layout.rows(n * CHUNK, width), layout.per_chunk(n, CHUNK)
    state, scalar = layout.per_chunk(n, width, key_width), layout.per_chunk(n, 1)
    rows = row_shape(batch, count * CHUNK, heads, key_width, dtype)
    factor = jax.ShapeDtypeStruct(decays.coarse.shape, jnp.float32)
    inner = jax.ShapeDtypeStruct((batch, heads, count, 1), jnp.float32)
    (out,) = backend.pallas(
        functools.partial(
            _gradients_body,
            chunks=n,
            parts=column_parts(key_width),
            v_step=blocks.v_step or width,
            scale=scale,
        ),
        name="linear_attention_gradients",
        grid=(batch, heads, count // n),
        in_specs=[keys, keys, DecayRows(*[row] * 4), values, values, state, state],
        out_specs=[HeadGradients(dkeys, dkeys, row, row, row, scalar)],
        out_shape=[HeadGradients(rows, rows, factor, factor, factor, inner)],
        fastest_first=(1, 2, 0),
        num_warps=blocks.gradients[0],
        num_stages=blocks.gradients[1],
    )(q, k, decays, v, do, states, dstates)
    return out
