"""Third kernel: the walk back over the chunks that carries the state's gradient.

    dV = Tᵀ (w K dS') + Yᵀ dO     dS <- γ_C dS' + Qᵀ (h dO) − Kᵀ (f dV)

The mirror image of the walk (walk.py), cut alike: one program takes some columns of V of a value
head from the last chunk to the first, dSᵀ [v, K] in registers. Read: dO, k, q, T, Y. Written: dV,
and dS after each chunk for the gradients of q, k and g.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import Scores, walk_back_chunk
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, span
from kernels_pallas.gated_delta_rule.walk import read_rows, with_matrices


class WalkedBack(NamedTuple):
    """What a walk back leaves behind; the last two only if stored."""

    first: Any  # gradient of the transposed state before the first chunk [B, HV, V, K] float32
    v: Any = None  # dV in the kernels' layout
    states: Any = None  # gradients of the transposed states after each chunk [B, HV, N, V, K]


def _body(q_ref, k_ref, do_ref, score_refs, gamma_ref, last_ref, out, *, chunks, parts, carried):
    if carried:

        @pl.when(pl.program_id(3) == 0)
        def _():
            out.first[...] = last_ref[...]

    start_ref = out.first if carried else last_ref

    def chunk(step, dstate):
        i = chunks - 1 - step
        rows, factors = span(i, CHUNK), read_rows(score_refs, gamma_ref, i)
        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)
        if out.states is not None:
            for part, x in zip(parts, dstate, strict=True):
                out.states[i, :, part] = x.astype(out.states.dtype)
        scores = with_matrices(score_refs, rows, factors)
        dstate, dv = walk_back_chunk(dstate, q, k, do_ref[rows, :].T, scores, factors.gamma)
        if out.v is not None:
            out.v[rows, :] = dv.astype(out.v.dtype).T
        return dstate

    dstate = tuple(start_ref[:, part] for part in parts)
    dstate = jax.lax.fori_loop(0, chunks, chunk, dstate)
    for part, x in zip(parts, dstate, strict=True):
        out.first[:, part] = x


def walk_back(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    scores: Scores,
    from_start: jax.Array,
    last: jax.Array,
    *,
    store: bool,
    blocks: Blocks,
) -> WalkedBack:
    """Walks back over the chunks.

    Args:
      q: queries in the kernels' layout.
      k: keys in the kernels' layout.
      do: gradient of o in the kernels' layout, in q's dtype.
      scores: of all chunks.
      from_start: γ [B, HV, N, C].
      last: gradient of the transposed state after the last chunk [B, HV, V, K] float32.
      store: return dV and dS as well.
      blocks: sizes.

    Returns:
      The gradients; dV has `do`'s shape and dtype.
    """
    batch, heads, count, _ = from_start.shape
    key_heads = k.shape[1 if backend.platform() == "tpu" else 2]
    key_width, width = k.shape[-1], last.shape[2]
    columns = blocks.v_block or width
    n = blocks.walk_chunks or count
    programs = count // n
    layout = Layout(heads // key_heads, lambda c, s: programs - 1 - s)
    column = lambda c, s: c  # noqa: E731
    keys = layout.rows(n * CHUNK, key_width, value_head=False)
    values = layout.rows(n * CHUNK, columns, column=column)
    matrix, row = layout.per_chunk(n * CHUNK, CHUNK), layout.per_chunk(n, CHUNK)
    state = layout.state(columns, key_width, column)
    out_specs = WalkedBack(state)
    out_shape = WalkedBack(jax.ShapeDtypeStruct(last.shape, jnp.float32))
    if store:
        states = layout.per_chunk(n, columns, key_width, column=column)
        kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), k.dtype)
        out_specs = WalkedBack(state, values, states)
        out_shape = out_shape._replace(v=jax.ShapeDtypeStruct(do.shape, do.dtype), states=kept)
    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(key_width), carried=blocks.walk_chunks > 0
        ),
        name="gated_delta_walk_back" if store else "gated_delta_walk_back_final",
        grid=(batch, heads, width // columns, programs),
        in_specs=[keys, keys, values, Scores(matrix, matrix, row, row, row), row, state],
        out_specs=[out_specs],
        out_shape=[out_shape],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=blocks.back[0],
        num_stages=blocks.back[1],
    )(q, k, do, scores, from_start, last)
    return out
