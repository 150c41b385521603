"""Fifth kernel: the gradients of q, a, b, k and g, for all chunks at once.

    dO Sᵀ    dR Sᵀ    U dS'ᵀ   V dS'ᵀ    rowsum_V(S ∘ dS')          with the states

and those of the scores (pair_gradients.py) through the decays, which are worked out anew
(gradient_math.py). One program takes one chunk of one head on a GPU, eight on a TPU; half of the
rows (all on a TPU) and a part of K at a time, for which it goes over V. Read: dO, dR, U (and V) and the scores' gradients once a part
of K, S and dS' once, q, k (a, b) and g. Written: dq, dk (da, db) and dg.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, matmul
from kernels_pallas.dplr.blocks import part_width
from kernels_pallas.dplr.gradient_math import PairGradients, row_gradients
from kernels_pallas.dplr.kernel_math import Vectors
from kernels_pallas.dplr.pair_gradients import Walks
from kernels_pallas.dplr.prepare import Inputs, input_specs, read_vectors
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import to_column, to_row
from kernels_pallas.gated_delta_rule.layout import Layout, row_shape, span
from kernels_pallas.vector_decay_math import chunk_bits, tile_rows


class Gradients(NamedTuple):
    """The gradients, in the kernels' layout."""

    q: Any  # of q times its factor
    k: Any  # of k; in KDA of k times its normaliser
    a: Any  # None in KDA
    b: Any  # None in KDA
    g: Any  # float32
    beyond: Any  # what is to be added to g: see `vector_decay_math.with_beyond`
    beta: Any  # KDA: gradient of β by what is written along b, [B, H, N, C] float32


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

    zeros = jnp.zeros((rows.size, part), jnp.float32)
    start = Vectors(zeros, zeros, zeros, None if w.v is None else zeros)
    first = jnp.zeros((1, part), jnp.float32)
    return backend.loop(w.u.shape[-1] // v_step, add, (start, first))


def _body(
    refs: Inputs,
    w: Walks,
    pairs: PairGradients,
    beta_ref,
    out: Gradients,
    *,
    chunks,
    part,
    v_step,
    scale,
):
    is_before = refs.a is not None
    operands, count = refs.q.dtype, refs.q.shape[-1] // part
    tile = tile_rows(CHUNK)
    tiles = CHUNK // tile

    def chunk(i, carry):
        bits = chunk_bits(refs.g, span(i, CHUNK), part, tile, operands)

        def half(r, carry):
            at = [(span(i * tiles + n, tile), span(n, tile)) for n in (r, 1 - r)]
            rows, mine = at[0]
            row = pl.ds(i, 1), mine
            own = tuple(to_column(ref[row]) for ref in pairs.own)

            def given(is_other, columns):
                rows, lanes = at[is_other]
                x = read_vectors(refs, rows, (pl.ds(i, 1), lanes), columns, scale)
                return x, refs.g[rows, columns]

            def below(reads_other, writes_other):
                block = at[reads_other][0], at[writes_other][1]
                return jax.tree.map(lambda ref: ref[block], pairs.below)

            def columns_of_k(p, dbeta):
                columns = span(p, part)
                found = row_gradients(
                    lambda: given(False, columns),
                    (lambda: given(True, columns)) if tiles > 1 else None,
                    below,
                    own,
                    *_state_products(w, i, rows, columns, part, v_step),
                    r == 1,
                    bits,
                    operands,
                    is_before,
                )
                d = found.rows
                out.g[rows, columns] = found.g
                out.q[rows, columns] = d.q.astype(out.q.dtype)
                if found.beyond is not None:
                    out.beyond[pl.ds(i * tiles + r, 1), columns] = found.beyond
                if is_before:
                    for ref, y in zip((out.a, out.b, out.k), d[1:], strict=True):
                        ref[rows, columns] = y.astype(ref.dtype)
                    return dbeta
                # a = −k and b = β k of the normalised keys.
                x, _ = given(False, columns)
                dk = to_column(beta_ref[row]) * d.b - d.a
                out.k[rows, columns] = dk.astype(out.k.dtype)
                return dbeta - jnp.sum(x.a * d.b, axis=1)[:, None]

            dbeta = backend.loop(count, columns_of_k, jnp.zeros((tile, 1), jnp.float32))
            if out.beta is not None:
                out.beta[row] = to_row(dbeta)
            return carry

        return backend.loop(tiles, half, carry)

    backend.loop(chunks, chunk, 0)


def gradients(
    inputs: Inputs,
    walks: Walks,
    pairs: PairGradients,
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
      pairs: gradients of the scores.
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
    matrix, is_kda = layout.per_chunk(n * CHUNK, CHUNK), inputs.a is None

    tiles = CHUNK // tile_rows(CHUNK)

    def outputs(key, g, row, half):
        no_kda, kda = (None if is_kda else key), (row if is_kda else None)
        return Gradients(key, key, no_kda, no_kda, g, half if tiles > 1 else None, kda)

    length = count * CHUNK
    shapes = outputs(
        row_shape(batch, length, heads, key_width, dtype),
        row_shape(batch, length, heads, key_width, jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, count, CHUNK), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, count * tiles, key_width), jnp.float32),
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
            PairGradients(
                jax.tree.map(lambda _: matrix, pairs.below), jax.tree.map(lambda _: row, pairs.own)
            ),
            row if is_kda else None,
        ],
        out_specs=[outputs(keys, keys, row, layout.per_chunk(n * tiles, key_width))],
        out_shape=[shapes],
        fastest_first=(1, 2, 0),
        num_warps=blocks.gradients[0],
        num_stages=blocks.gradients[1],
    )(inputs, walks, pairs, beta)
    return out
