"""Third kernel: the walk back over the chunks that carries the state's gradient.

    D = B_e dS'    dS <- γ dS' + Wᵀ D + Mᵀ dO    dR = Tᵀ D + Fᵀ dO    dV = Zᵀ D + Yᵀ dO + K_e dS'

The mirror image of the walk (walk.py), cut alike; in KDA dV is dR. Read: dO, W, M, B_e, K_e, T, F,
Z, Y. Written: dR, dV, and dS after each chunk for the gradients of the other inputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.dplr.kernel_math import Squares, walk_back_chunk
from kernels_pallas.dplr.prepare import Prepared
from kernels_pallas.dplr.walk import load_given, prepared_specs
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, span


class WalkedBack(NamedTuple):
    """What the walk back leaves behind."""

    first: Any  # gradient of the transposed state before the first chunk [B, H, V, K] float32
    r: Any  # dR in the kernels' layout
    v: Any  # dV, likewise; None in KDA
    states: Any  # gradients of the transposed states after each chunk [B, H, N, V, K]


def _body(x: Prepared, do_ref, last_ref, out: WalkedBack, *, chunks, parts, carried):
    if carried:

        @pl.when(pl.program_id(3) == 0)
        def _():
            out.first[...] = last_ref[...]

    start_ref = out.first if carried else last_ref

    def chunk(step, dstate):
        i = chunks - 1 - step
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        if out.states is not None:
            for part, s in zip(parts, dstate, strict=True):
                out.states[i, :, part] = s.astype(out.states.dtype)
        dstate, dr, dv = walk_back_chunk(
            dstate,
            do_ref[rows, :].T,
            load(x.rows.w, rows, parts),
            load(x.rows.m, rows, parts),
            load(x.rows.b, rows, parts),
            load_given(x.rows.k, rows, parts),
            Squares(*(None if ref is None else ref[rows, :] for ref in x.squares)),
            load(x.whole, row, parts),
        )
        if out.r is not None:
            out.r[rows, :] = dr.astype(out.r.dtype).T
        if out.v is not None and dv is not None:
            out.v[rows, :] = dv.astype(out.v.dtype).T
        return dstate

    dstate = tuple(start_ref[:, part] for part in parts)
    dstate = jax.lax.fori_loop(0, chunks, chunk, dstate)
    for part, s in zip(parts, dstate, strict=True):
        out.first[:, part] = s


def walk_back(
    x: Prepared, do: jax.Array, last: jax.Array, *, store: bool, blocks: Blocks
) -> WalkedBack:
    """Walks back over the chunks.

    Args:
      x: what `prepare` computed.
      do: gradient of o in the kernels' layout.
      last: gradient of the transposed state after the last chunk [B, H, V, K] float32.
      blocks: sizes.

      store: whether more than the gradient of the first state is asked for.
      blocks: sizes.

    Returns:
      The gradients; dR and dV have `do`'s shape and dtype.
    """
    batch, heads, count, key_width = x.whole.shape
    width = last.shape[2]
    columns = blocks.v_block or width
    n = blocks.walk_chunks or count
    programs = count // n
    layout = Layout(1, lambda c, s: programs - 1 - s)
    column = lambda c, s: c  # noqa: E731
    values = layout.rows(n * CHUNK, columns, column=column)
    state = layout.state(columns, key_width, column)
    states = layout.per_chunk(n, columns, key_width, column=column)
    is_kda = x.rows.k is None
    rows = jax.ShapeDtypeStruct(do.shape, do.dtype)
    kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), do.dtype)
    first = jax.ShapeDtypeStruct(last.shape, jnp.float32)
    shapes, specs = WalkedBack(first, None, None, None), WalkedBack(state, None, None, None)
    if store:
        shapes = WalkedBack(first, rows, None if is_kda else rows, kept)
        specs = WalkedBack(state, values, None if is_kda else values, states)
    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(key_width), carried=blocks.walk_chunks > 0
        ),
        name="kda_walk_back" if is_kda else "dplr_walk_back",
        grid=(batch, heads, width // columns, programs),
        in_specs=[prepared_specs(x, layout, n), values, state],
        out_specs=[specs],
        out_shape=[shapes],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=blocks.back[0],
        num_stages=blocks.back[1],
    )(x, do, last)
    return out
