"""Fourth kernel: the gradients of q, k, g and β, for all chunks at once.

    X = dO Nᵀ    Z = dV Nᵀ                      then G and J
    dO Sᵀ        dV Sᵀ       N dS'ᵀ             then dQ and dK

(gradient_math.py has the equations.) One program takes one chunk of one value head on a GPU, eight
on a TPU. It goes over V twice: the products between rows first, which leave two [C, C] matrices in
bfloat16, then those with the states; together their sums would not fit in the registers. Both are
loops, since unrolled their operands would not fit either. dO, dV and N come from L2 the second
time.
Read: dO, dV, N, S and dS' once, q and k: 4.9 KB a token and head at K = 96, V = 256, which makes it
bound by memory. Written: dq, dk and rows for g and β, which XLA sums up (gates.py).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NT, matmul
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.gates import GateRows, decay_gradient
from kernels_pallas.gated_delta_rule.gradient_math import (
    PairProducts,
    StateProducts,
    add_state_products,
    pair_gradients,
    row_gradients,
)
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span
from kernels_pallas.gated_delta_rule.scores import read_gates

SMALLEST = 1e-20  # a writing strength under this is treated as 0


class Outputs(NamedTuple):
    """What the kernel writes."""

    q: Any
    k: Any
    beta: Any
    own: Any
    pairs: Any
    from_start: Any
    to_write: Any
    inner: Any  # <S, dS'>, one a chunk


def _body(
    q_ref,
    k_ref,
    gate_refs,
    news_ref,
    dv_ref,
    do_ref,
    states_ref,
    dstates_ref,
    out_refs,
    *,
    chunks,
    parts,
    v_step,
    scale,
    use_qk_l2norm,
):
    steps = news_ref.shape[-1] // v_step

    def chunk(i, carry):
        rows, row = span(i, CHUNK), pl.ds(i, 1)

        def add_pairs(j, sums):
            columns = span(j, v_step)
            news = news_ref[rows, columns]
            return PairProducts(
                sums.do_news + matmul(do_ref[rows, columns], news, NT),
                sums.dv_news + matmul(dv_ref[rows, columns], news, NT),
            )

        square = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        sums = backend.loop(steps, add_pairs, PairProducts(square, square))
        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)
        pair = pair_gradients(sums, q, k, read_gates(gate_refs, i), scale, use_qk_l2norm)
        out_refs.beta[row, :], out_refs.own[row, :] = pair.beta, pair.own
        out_refs.pairs[row, :] = pair.decay

        def add_states(j, carry):
            columns = span(j, v_step)
            sums, inner = carry
            state = tuple(states_ref[i, columns, part] for part in parts)
            dstate = tuple(dstates_ref[i, columns, part] for part in parts)
            do, dv, news = (ref[rows, columns] for ref in (do_ref, dv_ref, news_ref))
            for x, y in zip(state, dstate, strict=True):
                products = x.astype(jnp.float32) * y.astype(jnp.float32)
                inner = inner + jnp.sum(products, axis=1)[:, None]
            return add_state_products(sums, state, dstate, do, dv, news), inner

        zeros = tuple(jnp.zeros((CHUNK, x.shape[1]), jnp.float32) for x in k)
        inner = jnp.zeros((v_step, 1), jnp.float32)
        sums, inner = backend.loop(steps, add_states, (StateProducts(zeros, zeros, zeros), inner))
        out = row_gradients(sums, pair, q, k, read_gates(gate_refs, i), scale, use_qk_l2norm)
        for part, dq, dk in zip(parts, out.q, out.k, strict=True):
            out_refs.q[rows, part] = dq.astype(out_refs.q.dtype)
            out_refs.k[rows, part] = dk.astype(out_refs.k.dtype)
        out_refs.from_start[row, :], out_refs.to_write[row, :] = out.from_start, out.to_write
        out_refs.inner[row, :] = jnp.sum(inner, axis=0)[:, None]
        return carry

    backend.loop(chunks, chunk, 0)


def gradients(
    q: jax.Array,
    k: jax.Array,
    gates: GateRows,
    news: jax.Array,
    dv: jax.Array,
    do: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    *,
    blocks: Blocks,
    scale: float,
    use_qk_l2norm: bool,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of q, k, g and β.

    Args:
      q: queries in the kernels' layout.
      k: keys in the kernels' layout.
      gates: the gates.
      news: N in the kernels' layout.
      dv: gradient of v likewise.
      do: gradient of o likewise.
      states: transposed states before each chunk [B, HV, N, V, K].
      dstates: gradients of the transposed states after each chunk, likewise.
      blocks: sizes.
      scale: factor on the queries.
      use_qk_l2norm: whether rows were normalised.
      dtype: of the gradients of q and k.

    Returns:
      dq and dk for each value head, in the kernels' layout, and dg and dβ [B, HV, N, C] float32.
    """
    batch, heads, count, _ = gates.beta.shape
    key_heads = q.shape[1 if backend.platform() == "tpu" else 2]
    key_width, width = q.shape[-1], states.shape[3]
    n = blocks.chunks
    layout = Layout(heads // key_heads, lambda i: i)
    keys = layout.rows(n * CHUNK, key_width, value_head=False)
    dkeys = layout.rows(n * CHUNK, key_width)
    values, row = layout.rows(n * CHUNK, width), layout.per_chunk(n, CHUNK)
    state, scalar = layout.per_chunk(n, width, key_width), layout.per_chunk(n, 1)
    rows = row_shape(batch, count * CHUNK, heads, key_width, dtype)
    factor = jax.ShapeDtypeStruct(gates.beta.shape, jnp.float32)
    inner = factor.update(shape=(batch, heads, count, 1))
    (out,) = backend.pallas(
        functools.partial(
            _body,
            chunks=n,
            parts=column_parts(key_width),
            v_step=blocks.v_step or width,
            scale=scale,
            use_qk_l2norm=use_qk_l2norm,
        ),
        name="gated_delta_gradients",
        grid=(batch, heads, count // n),
        in_specs=[keys, keys, GateRows(*[row] * 5), values, values, values, state, state],
        out_specs=[Outputs(dkeys, dkeys, row, row, row, row, row, scalar)],
        out_shape=[Outputs(rows, rows, factor, factor, factor, factor, factor, inner)],
        fastest_first=(1, 2, 0),
        num_warps=blocks.gradients[0],
        num_stages=blocks.gradients[1],
    )(q, k, gates, news, dv, do, states, dstates)
    return finish(gates, out)


def finish(gates: GateRows, out: Outputs) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns dq, dk, dg and dβ, the latter two summed up by XLA."""
    dg = decay_gradient(gates, out.pairs, out.from_start, out.to_write, out.inner[..., 0])
    is_written = gates.beta > SMALLEST
    dbeta = out.own / jnp.where(is_written, gates.beta, 1.0)
    return out.q, out.k, dg, jnp.where(is_written, dbeta, out.beta + out.to_write)
