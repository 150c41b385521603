"""Second kernel: the walk over the chunks that carries the state.

    U = W S + Z V        O = M S + Y V        S <- γ S + B_eᵀ U + K_eᵀ V

(kernel_math.py has the notation; KDA has no K_e.) One program takes some columns of V of one head
(64 on a GPU, all on a TPU) from the first chunk to the last: they do not depend on each other. It
holds Sᵀ [v, K] in float32 registers; W, M, B_e, K_e, Z and Y come through shared memory, fetched
while the chunk before is worked on. Two products are the only chain from one state to the next. A
TPU program holds `walk_chunks` chunks at a time and the state in its output block, which stays in
VMEM from one to the next.

Read: v once; the rest by every program of a head, from L2 but for the first. Written: o, and for
the backward pass the state before each chunk (K·V / C values a token) and U instead of o.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.dplr.kernel_math import Squares, walk_chunk
from kernels_pallas.dplr.prepare import Prepared
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span


class Walked(NamedTuple):
    """What a walk leaves behind; what its kind does not ask for is None."""

    last: Any  # transposed state after the last chunk [B, H, V, K] float32
    o: Any = None  # in the kernels' layout
    u: Any = None  # U in the kernels' layout
    states: Any = None  # transposed states before each chunk [B, H, N, V, K]


def load_given(ref: Any, rows: Any, parts: Any) -> Any:
    """Reads the column parts of some rows, where there is a reference to read from."""
    return None if ref is None else load(ref, rows, parts)


def prepared_specs(x: Prepared, layout: Layout, chunks: int) -> Prepared:
    """Returns the block specs of what `prepare` computed."""
    width = x.whole.shape[-1]
    rows = layout.rows(chunks * CHUNK, width)
    matrix = layout.per_chunk(chunks * CHUNK, CHUNK)
    return Prepared(
        jax.tree.map(lambda _: rows, x.rows),
        jax.tree.map(lambda _: matrix, x.squares),
        layout.per_chunk(chunks, width),
    )


def _body(x: Prepared, v_ref, first_ref, out: Walked, *, chunks, parts, carried):
    z_ref = x.squares.t if x.squares.z is None else x.squares.z
    y_ref = x.squares.f if x.squares.y is None else x.squares.y
    if carried:  # the state lies in the output block between programs

        @pl.when(pl.program_id(3) == 0)
        def _():
            out.last[...] = first_ref[...]

    start_ref = out.last if carried else first_ref

    def chunk(i, state):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        if out.states is not None:
            for part, s in zip(parts, state, strict=True):
                out.states[i, :, part] = s.astype(out.states.dtype)
        state, u, o = walk_chunk(
            state,
            None if v_ref is None else v_ref[rows, :].T,
            load(x.rows.w, rows, parts),
            load_given(x.rows.m, rows, parts),
            load(x.rows.b, rows, parts),
            load_given(x.rows.k, rows, parts),
            None if z_ref is None else z_ref[rows, :],
            None if y_ref is None else y_ref[rows, :],
            load(x.whole, row, parts),
        )
        if o is not None:
            out.o[rows, :] = o.astype(out.o.dtype).T
        if out.u is not None:
            out.u[rows, :] = u.T
        return state

    state = tuple(start_ref[:, part] for part in parts)
    state = jax.lax.fori_loop(0, chunks, chunk, state)
    for part, s in zip(parts, state, strict=True):
        out.last[:, part] = s


def walk(
    kind: str, x: Prepared, v: jax.Array | None, initial: jax.Array, *, blocks: Blocks
) -> Walked:
    """Walks over the chunks.

    Args:
      kind: "output" for o, "states" for U and the states before each chunk; "final" for the last
        state alone; "homogeneous" likewise with v = 0.
      x: what `prepare` computed.
      v: values in the kernels' layout; None with "homogeneous".
      initial: transposed state before the first chunk [B, H, V, K] float32.
      blocks: sizes.

    Returns:
      What `kind` asks for; o and U have v's shape and dtype.
    """
    is_kda = x.rows.k is None
    if kind == "output" and not is_kda:  # T and F are for the walk back
        x = x._replace(squares=x.squares._replace(t=None, f=None))
    if kind != "output":  # M and Y (in KDA F) make the output
        squares = x.squares._replace(f=None, y=None)
        squares = squares if is_kda else squares._replace(t=None)
        x = x._replace(rows=x.rows._replace(m=None), squares=squares)
    if kind == "homogeneous":
        x = Prepared(x.rows._replace(k=None), Squares(None, None, None, None), x.whole)
    batch, heads, count, key_width = x.whole.shape
    width = initial.shape[2]
    columns = blocks.v_block or width
    n = blocks.walk_chunks or count
    layout = Layout(1, lambda c, s: s)
    column = lambda c, s: c  # noqa: E731
    values = layout.rows(n * CHUNK, columns, column=column)
    state = layout.state(columns, key_width, column)
    states = layout.per_chunk(n, columns, key_width, column=column)
    operands = x.rows.w.dtype
    rows = row_shape(batch, count * CHUNK, heads, width, operands)
    shapes, specs = Walked(jax.ShapeDtypeStruct(initial.shape, jnp.float32)), Walked(state)
    if kind == "output":
        shapes, specs = shapes._replace(o=rows), specs._replace(o=values)
    if kind == "states":
        kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), operands)
        shapes = shapes._replace(u=rows, states=kept)
        specs = specs._replace(u=values, states=states)
    warps, stages = blocks.walk if kind == "output" else blocks.states
    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(key_width), carried=blocks.walk_chunks > 0
        ),
        name=f"{'kda' if is_kda else 'dplr'}_walk_{kind}",
        grid=(batch, heads, width // columns, count // n),
        in_specs=[prepared_specs(x, layout, n), None if v is None else values, state],
        out_specs=[specs],
        out_shape=[shapes],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=warps,
        num_stages=stages,
    )(x, v, initial)
    return out
