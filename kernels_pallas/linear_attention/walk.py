"""The walk over the chunks that carries the state.

    O = Q̂ S + Y V        S <- e^{G_C} S + K_eᵀ V

One program takes some columns of V of one head (64 on a GPU, all on a TPU) from the first chunk to
the last: they do not depend on each other. It holds Sᵀ [v, K] in float32 registers; Q̂, K_e and Y
come through shared memory, fetched while the chunk before is worked on. No product waits for
another of its chunk, only for the state. A TPU program holds `walk_chunks` chunks at a time and
the state in its output block, which stays in VMEM from one to the next.

Read: v once; Q̂, K_e and Y by every program of a head, from L2 but for the first. Written: o, or for
the backward pass the state before each chunk (K·V / C values a token). Bytes a token and head in
bfloat16 at K = 192, V = 384: 2.4 KB with o, 3.5 KB with states.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, NT, matmul
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span
from kernels_pallas.linear_attention.blocks import CHUNK, Blocks
from kernels_pallas.linear_attention.kernel_terms import Terms, where_given


class Walked(NamedTuple):
    """What a walk leaves behind; what its kind does not ask for is None."""

    last: Any  # transposed state after the last chunk [B, HV, V, K] float32
    o: Any = None  # in the kernels' layout
    states: Any = None  # transposed states before each chunk [B, HV, N, V, K]


def scaled(x: jax.Array, factor: Any, row: Any) -> jax.Array:
    """Scales the columns of x [v, C] by a chunk's row of factors, where there are any."""
    return x if factor is None else (x.astype(jnp.float32) * factor[row, :]).astype(x.dtype)


def times_state(state: Parts, rows: Parts) -> jax.Array:
    """Returns Sᵀ rowsᵀ [v, C] float32 of a state's parts [v, k_p] and rows' [C, k_p]."""
    return add_up(matmul(x.astype(y.dtype), y, NT) for x, y in zip(state, rows, strict=True))


def decayed(state: Parts, whole: Any, row: Any, parts: tuple[slice, ...]) -> Parts:
    """Scales a state by a chunk's decay, one number or one a channel."""
    if whole.shape[-1] == 1:
        return tuple(x * whole[row, :] for x in state)
    return tuple(x * whole[row, part] for x, part in zip(state, parts, strict=True))


def _body(terms: Terms, v_ref, first_ref, out: Walked, *, chunks, parts, carried):
    if carried:  # the state lies in the output block between programs

        @pl.when(pl.program_id(3) == 0)
        def _():
            out.last[...] = first_ref[...]

    start_ref = out.last if carried else first_ref

    def chunk(i, state):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        v = v_ref[rows, :].T
        if out.states is not None:
            for part, x in zip(parts, state, strict=True):
                out.states[i, :, part] = x.astype(out.states.dtype)
        if out.o is not None:
            o = times_state(state, load(terms.read, rows, parts))
            if terms.read_factor is not None:
                o = o * terms.read_factor[row, :]
            o = o + matmul(v, terms.scores[rows, :], NT)
            out.o[rows, :] = o.astype(out.o.dtype).T
        written = scaled(v, terms.write_factor, row)
        state = decayed(state, terms.whole, row, parts)
        keys = load(terms.write, rows, parts)
        return tuple(x + matmul(written, y, NN) for x, y in zip(state, keys, strict=True))

    state = tuple(start_ref[:, part] for part in parts)
    state = jax.lax.fori_loop(0, chunks, chunk, state)
    for part, x in zip(parts, state, strict=True):
        out.last[:, part] = x


def term_specs(terms: Terms, heads: int, n: int, at: Any) -> tuple[Terms, Layout]:
    """Returns the block specs of `Terms` of n chunks, and the layout of other rows.

    Args:
      terms: the arrays.
      heads: HV.
      n: chunks a block.
      at: from the grid's indices after batch row and head to the index of a block of rows.
    """
    width = terms.write.shape[-1]
    key_heads = terms.write.shape[1 if backend.platform() == "tpu" else 2]
    layout = Layout(heads // key_heads, at)
    rows = layout.rows(n * CHUNK, width, value_head=False)
    factor = layout.per_chunk(n, CHUNK)
    whole = layout.per_chunk(n, terms.whole.shape[-1])
    specs = Terms(rows, factor, rows, factor, layout.per_chunk(n * CHUNK, CHUNK), whole)
    return where_given(terms, specs), layout


def walk(kind: str, terms: Terms, v: jax.Array, initial: jax.Array, *, blocks: Blocks) -> Walked:
    """Walks over the chunks.

    Args:
      kind: "output" for o; "states" for the states before each chunk; "final" for the last state
        alone.
      terms: of all chunks.
      v: values in the kernels' layout.
      initial: transposed state before the first chunk [B, HV, V, K] float32.
      blocks: sizes.

    Returns:
      What `kind` asks for; o has v's shape and dtype.
    """
    batch, heads, count, _ = terms.whole.shape
    width, key_width = initial.shape[2:]
    columns = blocks.v_block or width
    n = blocks.walk_chunks or count
    column = lambda c, s: c  # noqa: E731
    if kind != "output":
        terms = terms._replace(read=None, read_factor=None, scores=None)
    specs, layout = term_specs(terms, heads, n, lambda c, s: s)
    values = layout.rows(n * CHUNK, columns, column=column)
    state = layout.state(columns, key_width, column)
    states = layout.per_chunk(n, columns, key_width, column=column)
    last = jax.ShapeDtypeStruct(initial.shape, jnp.float32)
    out_shape = {
        "output": Walked(last, o=row_shape(batch, count * CHUNK, heads, width, v.dtype)),
        "states": Walked(
            last, states=jax.ShapeDtypeStruct((batch, heads, count, width, key_width), v.dtype)
        ),
        "final": Walked(last),
    }[kind]
    warps, stages = blocks.walk if kind == "output" else blocks.states
    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(key_width), carried=blocks.walk_chunks > 0
        ),
        name=f"linear_attention_walk_{kind}",
        grid=(batch, heads, width // columns, count // n),
        in_specs=[specs, values, state],
        out_specs=[where_given(out_shape, Walked(state, values, states))],
        out_shape=[out_shape],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=warps,
        num_stages=stages,
    )(terms, v, initial)
    return out
