"""The walk back over the chunks that carries the state's gradient.

    dV = K_e dS' + Yᵀ dO        dS <- e^{G_C} dS' + Q̂ᵀ dO

The mirror image of the walk (walk.py), cut alike: one program takes some columns of V of a head
from the last chunk to the first, dSᵀ [v, K] in registers. Read: dO, Q̂, K_e and Y. Written: dV, and
dS after each chunk for the gradients of q, k and g.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, matmul
from kernels_pallas.gated_delta_rule.layout import column_parts, load, span
from kernels_pallas.linear_attention.blocks import CHUNK, Blocks
from kernels_pallas.linear_attention.kernel_terms import Terms, where_given
from kernels_pallas.linear_attention.walk import decayed, scaled, term_specs, times_state


class WalkedBack(NamedTuple):
    """What a walk back leaves behind; the last two only if stored."""

    first: Any  # gradient of the transposed state before the first chunk [B, HV, V, K] float32
    v: Any = None  # dV in the kernels' layout
    states: Any = None  # gradients of the transposed states after each chunk [B, HV, N, V, K]


def _body(terms: Terms, do_ref, last_ref, out: WalkedBack, *, chunks, parts, carried):
    if carried:

        @pl.when(pl.program_id(3) == 0)
        def _():
            out.first[...] = last_ref[...]

    start_ref = out.first if carried else last_ref

    def chunk(step, dstate):
        i = chunks - 1 - step
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        do = do_ref[rows, :].T
        if out.states is not None:
            for part, x in zip(parts, dstate, strict=True):
                out.states[i, :, part] = x.astype(out.states.dtype)
        if out.v is not None:
            dv = times_state(dstate, load(terms.write, rows, parts))
            if terms.write_factor is not None:
                dv = dv * terms.write_factor[row, :]
            dv = dv + matmul(do, terms.scores[rows, :], NN)
            out.v[rows, :] = dv.astype(out.v.dtype).T
        read = scaled(do, terms.read_factor, row)
        dstate = decayed(dstate, terms.whole, row, parts)
        queries = load(terms.read, rows, parts)
        return tuple(x + matmul(read, y, NN) for x, y in zip(dstate, queries, strict=True))

    dstate = tuple(start_ref[:, part] for part in parts)
    dstate = jax.lax.fori_loop(0, chunks, chunk, dstate)
    for part, x in zip(parts, dstate, strict=True):
        out.first[:, part] = x


def walk_back(
    terms: Terms, do: jax.Array, last: jax.Array, *, store: bool, blocks: Blocks
) -> WalkedBack:
    """Walks back over the chunks.

    Args:
      terms: of all chunks.
      do: gradient of o in the kernels' layout, in the rows' dtype.
      last: gradient of the transposed state after the last chunk [B, HV, V, K] float32.
      store: return dV and dS as well.
      blocks: sizes.

    Returns:
      The gradients; dV has `do`'s shape and dtype.
    """
    batch, heads, count, _ = terms.whole.shape
    width, key_width = last.shape[2:]
    columns = blocks.v_block or width
    n = blocks.walk_chunks or count
    programs = count // n
    column = lambda c, s: c  # noqa: E731
    specs, layout = term_specs(terms, heads, n, lambda c, s: programs - 1 - s)
    if not store:
        unused = dict(write_factor=None, scores=None)
        terms, specs = terms._replace(**unused), specs._replace(**unused)
        terms, specs = terms._replace(write=None), specs._replace(write=None)
    values = layout.rows(n * CHUNK, columns, column=column)
    state = layout.state(columns, key_width, column)
    states = layout.per_chunk(n, columns, key_width, column=column)
    out_shape = WalkedBack(jax.ShapeDtypeStruct(last.shape, jnp.float32))
    if store:
        kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), do.dtype)
        out_shape = out_shape._replace(v=jax.ShapeDtypeStruct(do.shape, do.dtype), states=kept)
    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(key_width), carried=blocks.walk_chunks > 0
        ),
        name="linear_attention_walk_back" if store else "linear_attention_walk_back_final",
        grid=(batch, heads, width // columns, programs),
        in_specs=[specs, values, state],
        out_specs=[where_given(out_shape, WalkedBack(state, values, states))],
        out_shape=[out_shape],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=blocks.back[0],
        num_stages=blocks.back[1],
    )(terms, do, last)
    return out
