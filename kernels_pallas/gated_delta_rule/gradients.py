"""Fourth kernel: the gradients of q, k, g and β, for all chunks at once.

    X = dO Nᵀ    Y = dV Nᵀ    dO Sᵀ    dV Sᵀ    N dS'ᵀ

One program takes one chunk of one value head on a GPU, eight on a TPU, and adds these products up
over blocks of V in registers (two [C, C] and three [C, K] sums, about 100 registers a thread of
eight warps); then the closing arithmetic of `chunk_gradients`, with the derivative of the
l2-normalisation. The loop over V is a loop, since unrolled its operands would not fit.
Read: dO, dV, N, S and dS' once, q and k: 4.9 KB a token and head at K = 96, V = 256, which makes it
bound by memory. Written: dq, dk and two rows.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.gates import GateRows
from kernels_pallas.gated_delta_rule.kernel_math import add_products, chunk_gradients, no_products
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span
from kernels_pallas.gated_delta_rule.scores import read_gates


def _body(*refs, chunks, parts, v_step, scale, use_qk_l2norm):
    q_ref, k_ref, *gate_refs = refs[:7]
    news_ref, dv_ref, do_ref, states_ref, dstates_ref = refs[7:12]
    dq_ref, dk_ref, dg_ref, dbeta_ref = refs[12:]
    steps = news_ref.shape[-1] // v_step

    def chunk(i, carry):
        rows = span(i, CHUNK)
        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)

        def add(j, products):
            columns = span(j, v_step)
            return add_products(
                products,
                tuple(states_ref[i, columns, part] for part in parts),
                tuple(dstates_ref[i, columns, part] for part in parts),
                do_ref[rows, columns],
                dv_ref[rows, columns],
                news_ref[rows, columns],
            )

        products = no_products(CHUNK, k)
        products = add(0, products) if steps == 1 else jax.lax.fori_loop(0, steps, add, products)
        gates = read_gates(gate_refs, i)
        out = chunk_gradients(products, q, k, gates, scale, use_qk_l2norm)
        for part, dq, dk in zip(parts, out.q, out.k, strict=True):
            dq_ref[rows, part] = dq.astype(dq_ref.dtype)
            dk_ref[rows, part] = dk.astype(dk_ref.dtype)
        dg_ref[pl.ds(i, 1), :] = out.g
        dbeta_ref[pl.ds(i, 1), :] = out.beta
        return carry

    if chunks == 1:
        chunk(0, 0)
    else:
        jax.lax.fori_loop(0, chunks, chunk, 0)


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
    state = layout.per_chunk(n, width, key_width)
    rows = row_shape(batch, count * CHUNK, heads, key_width, dtype)
    factor = jax.ShapeDtypeStruct(gates.beta.shape, jnp.float32)
    return backend.pallas(
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
        in_specs=[keys, keys] + [row] * 5 + [values] * 3 + [state] * 2,
        out_specs=[dkeys, dkeys, row, row],
        out_shape=[rows, rows, factor, factor],
        num_warps=blocks.gradients[0],
        num_stages=blocks.gradients[1],
    )(q, k, *gates, news, dv, do, states, dstates)
