"""Third kernel: the walk back over the chunks that carries the state's gradient.

    Z = w (K dS') + P'ᵀ dO     dV = Tᵀ Z     dS <- γ_C dS' + Qᵀ (h dO) − Kᵀ (f dV)

The mirror image of the walk (walk.py), cut alike: one program takes some columns of V of a value
head from the last chunk to the first, dSᵀ [v, K] in registers. Read: dO, k, q, T, P'. Written: dV,
and dS after each chunk for the gradients of q, k and g.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import Scores, walk_back_chunk
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, span


def _body(*refs, store, chunks, parts, carried):
    q_ref, k_ref, do_ref, t_ref, p_ref, f_ref, h_ref, w_ref, gamma_ref, last_ref = refs[:10]
    first_ref, *outputs = refs[10:]

    if carried:

        @pl.when(pl.program_id(3) == 0)
        def _():
            first_ref[...] = last_ref[...]

    start_ref = first_ref if carried else last_ref

    def chunk(step, dstate):
        i = chunks - 1 - step
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)
        scores = Scores(t_ref[rows, :], p_ref[rows, :], f_ref[row, :], h_ref[row, :], w_ref[row, :])
        if store:
            for part, x in zip(parts, dstate, strict=True):
                outputs[1][i, :, part] = x.astype(outputs[1].dtype)
        do, gamma = do_ref[rows, :].T, gamma_ref[row, CHUNK - 1 : CHUNK]
        dstate, dv = walk_back_chunk(dstate, q, k, do, scores, gamma)
        if store:
            outputs[0][rows, :] = dv.astype(outputs[0].dtype).T
        return dstate

    dstate = tuple(start_ref[:, part] for part in parts)
    dstate = jax.lax.fori_loop(0, chunks, chunk, dstate)
    for part, x in zip(parts, dstate, strict=True):
        first_ref[:, part] = x


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
) -> tuple[jax.Array, ...]:
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
      The gradient of the transposed state before the first chunk [B, HV, V, K] float32, and if
      `store` dV in `do`'s shape and dtype and the gradients of the transposed states after each
      chunk [B, HV, N, V, K].
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
    out_specs, out_shape = [state], [jax.ShapeDtypeStruct(last.shape, jnp.float32)]
    if store:
        out_specs += [values, layout.per_chunk(n, columns, key_width, column=column)]
        states = (batch, heads, count, width, key_width)
        out_shape += [
            jax.ShapeDtypeStruct(do.shape, do.dtype),
            jax.ShapeDtypeStruct(states, k.dtype),
        ]
    return backend.pallas(
        functools.partial(
            _body,
            store=store,
            chunks=n,
            parts=column_parts(key_width),
            carried=blocks.walk_chunks > 0,
        ),
        name="gated_delta_walk_back" if store else "gated_delta_walk_back_final",
        grid=(batch, heads, width // columns, programs),
        in_specs=[keys, keys, values, matrix, matrix, row, row, row, row, state],
        out_specs=out_specs,
        out_shape=out_shape,
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=blocks.back[0],
        num_stages=blocks.back[1],
    )(q, k, do, *scores, from_start, last)
