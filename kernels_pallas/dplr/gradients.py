"""Fourth kernel: the gradients of q, a, b, k and g, for all chunks at once.

    dO Uᵀ    dR Uᵀ    dO Vᵀ    dR Vᵀ                                between rows
    dO Sᵀ    dR Sᵀ    U dS'ᵀ   V dS'ᵀ    rowsum_V(S ∘ dS')          with the states

(gradient_math.py has the equations; KDA has no products with V.) One program takes one chunk of one
head on a GPU, eight on a TPU. It goes over V for the products between rows, which leave matrices
[C, C]; then, for a part of K at a time, over V again for those with the states, and takes both
through the decays, which it works out anew. Read: dO, dR, U (and V) once a part of K, S and dS'
once, q, k (a, b) and g. Written: dq, dk (da, db) and dg.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, NT, matmul
from kernels_pallas.dplr.blocks import part_width
from kernels_pallas.dplr.gradient_math import cut_pairs, row_gradients
from kernels_pallas.dplr.kernel_math import Pairs, Vectors
from kernels_pallas.dplr.prepare import Inputs, input_specs, read_vectors
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import indices, to_column, to_row
from kernels_pallas.gated_delta_rule.layout import Layout, row_shape, span
from kernels_pallas.vector_decay_math import chunk_bits


class Walks(NamedTuple):
    """What the walks left behind, in the kernels' layout."""

    do: Any
    dr: Any
    u: Any
    v: Any  # None in KDA
    states: Any  # transposed, before each chunk [B, H, N, V, K]
    dstates: Any  # gradients of those after each chunk


class Gradients(NamedTuple):
    """The gradients, in the kernels' layout."""

    q: Any  # of q times its factor
    k: Any  # of k; in KDA of k times its normaliser
    a: Any  # None in KDA
    b: Any  # None in KDA
    g: Any  # float32
    beta: Any  # KDA: gradient of β by what is written along b, [B, H, N, C] float32
    own: Any  # KDA: β times the gradient of β, another sum, likewise


def _pair_products(w: Walks, rows: Any, v_step: int) -> Pairs:
    def add(j, sums):
        columns = span(j, v_step)
        do, dr, u = (ref[rows, columns] for ref in (w.do, w.dr, w.u))
        v = None if w.v is None else w.v[rows, columns]

        def more(total, x, y):
            return None if y is None else total + matmul(x, y, NT)

        return Pairs(
            more(sums.qb, do, u), more(sums.ab, dr, u), more(sums.qk, do, v), more(sums.ak, dr, v)
        )

    zeros = jnp.zeros((CHUNK, CHUNK), jnp.float32)
    others = None if w.v is None else zeros
    start = Pairs(zeros, zeros, others, others)
    return backend.loop(w.u.shape[-1] // v_step, add, start)


def _state_products(
    w: Walks, i: Any, rows: Any, columns: Any, part: int, v_step: int
) -> tuple[Vectors, jax.Array]:
    """Returns dQ̂, dÂ, dB_e, dK_e and dγ of some columns of K."""

    def add(j, carry):
        at = span(j, v_step)
        sums, dwhole = carry
        state, dstate = w.states[i, at, columns], w.dstates[i, at, columns]
        do, dr, u = (ref[rows, at] for ref in (w.do, w.dr, w.u))
        products = state.astype(jnp.float32) * dstate.astype(jnp.float32)
        sums = Vectors(
            sums.q + matmul(do, state, NN),
            sums.a + matmul(dr, state, NN),
            sums.b + matmul(u, dstate, NN),
            None if w.v is None else sums.k + matmul(w.v[rows, at], dstate, NN),
        )
        return sums, dwhole + jnp.sum(products, axis=0)[None, :]

    zeros = jnp.zeros((CHUNK, part), jnp.float32)
    start = Vectors(zeros, zeros, zeros, None if w.v is None else zeros)
    first = jnp.zeros((1, part), jnp.float32)
    return backend.loop(w.u.shape[-1] // v_step, add, (start, first))


def _body(refs: Inputs, w: Walks, beta_ref, out: Gradients, *, chunks, part, v_step, scale):
    is_before = refs.a is not None
    operands, count = refs.q.dtype, refs.q.shape[-1] // part

    def chunk(i, carry):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        products = _pair_products(w, rows, v_step)
        if out.own is not None:
            j, t = indices(CHUNK)
            out.own[row, :] = jnp.sum(jnp.where(j == t, products.ab, 0.0), axis=0)[None, :]
        pairs = cut_pairs(products, operands)
        bits = chunk_bits(refs.g, rows, part, operands)

        def columns_of_k(p, dbeta):
            columns = span(p, part)
            d, dwhole = _state_products(w, i, rows, columns, part, v_step)

            def given():
                return read_vectors(refs, rows, row, columns, scale), refs.g[rows, columns]

            total, dg = row_gradients(given, pairs, d, dwhole, bits, operands, is_before)
            out.g[rows, columns] = dg
            out.q[rows, columns] = total.q.astype(out.q.dtype)
            if is_before:
                for ref, y in zip((out.a, out.b, out.k), total[1:], strict=True):
                    ref[rows, columns] = y.astype(ref.dtype)
                return dbeta
            # a = −k and b = β k of the normalised keys.
            x, _ = given()
            beta = to_column(beta_ref[row, :])
            dk = beta * total.b - total.a
            out.k[rows, columns] = dk.astype(out.k.dtype)
            return dbeta - jnp.sum(x.a * total.b, axis=1)[:, None]

        dbeta = backend.loop(count, columns_of_k, jnp.zeros((CHUNK, 1), jnp.float32))
        if out.beta is not None:
            out.beta[row, :] = to_row(dbeta)
        return carry

    backend.loop(chunks, chunk, 0)


def gradients(
    inputs: Inputs,
    walks: Walks,
    beta: jax.Array | None,
    *,
    blocks: Blocks,
    scale: float,
    dtype: Any,
) -> Gradients:
    """Computes the gradients of what `prepare` took.

    Args:
      inputs: its inputs.
      walks: what the walks left behind.
      beta: KDA's β, rows [B, H, N, C] float32; None otherwise.
      blocks: sizes.
      scale: factor on the queries where `inputs` has no factors.
      dtype: of the gradients of q, k, a and b.

    Returns:
      The gradients; q and k of KDA for each value head.
    """
    batch, heads, count, width, key_width = walks.states.shape
    key_heads = inputs.q.shape[1 if backend.platform() == "tpu" else 2]
    n = blocks.chunks
    layout = Layout(heads // key_heads, lambda i: i)
    keys, values = layout.rows(n * CHUNK, key_width), layout.rows(n * CHUNK, width)
    row, state = layout.per_chunk(n, CHUNK), layout.per_chunk(n, width, key_width)
    is_kda = inputs.a is None

    def outputs(key, g, row):
        no_kda, kda = (None if is_kda else key), (row if is_kda else None)
        return Gradients(key, key, no_kda, no_kda, g, kda, kda)

    length = count * CHUNK
    shapes = outputs(
        row_shape(batch, length, heads, key_width, dtype),
        row_shape(batch, length, heads, key_width, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, count, CHUNK), jnp.float32),
    )
    (out,) = backend.pallas(
        functools.partial(
            _body,
            chunks=n,
            part=part_width(backend.platform(), key_width),
            v_step=blocks.v_step or width,
            scale=scale,
        ),
        name="kda_gradients" if is_kda else "dplr_gradients",
        grid=(batch, heads, count // n),
        in_specs=[
            input_specs(inputs, layout, n),
            Walks(values, values, values, None if is_kda else values, state, state),
            row if is_kda else None,
        ],
        out_specs=[outputs(keys, keys, row)],
        out_shape=[shapes],
        fastest_first=(1, 2, 0),
        num_warps=blocks.gradients[0],
        num_stages=blocks.gradients[1],
    )(inputs, walks, beta)
    return out
