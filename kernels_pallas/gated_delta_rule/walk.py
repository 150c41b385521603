"""Second kernel: the walk over the chunks that carries the state.

    E = V − f (K S)     N = T E     O = h (Q S) + Y E     S <- γ_C S + Kᵀ (w N)

(kernel_math.py has the notation.) One program takes some columns of V of one value head (64 on a
GPU, all on a TPU) from the first chunk to the last: they do not depend on each other. It holds
Sᵀ [v, K] in float32 registers; each product's left operand is what the last one left there, its
right one (K, T, Q, Y) comes through shared memory, fetched while the chunk before is worked on.
A TPU program holds `walk_chunks` chunks at a time and the state in its output block, which stays
in VMEM from one to the next.

Read: v once; k, q, T and Y by every program of a head, from L2 but for the first. Written: o, and
for the backward pass the state before each chunk (K·V / C values a token) and N instead of o.
Bytes at K = 96, V = 256: 1.9 KB a token and head with o, 2.6 KB with states and N.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import TN, matmul
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import Scores, indices, walk_chunk
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span


class Walked(NamedTuple):
    """What a walk leaves behind; what its kind does not ask for is None."""

    last: Any  # transposed state after the last chunk [B, HV, V, K] float32
    o: Any = None  # in the kernels' layout
    news: Any = None  # N in the kernels' layout
    states: Any = None  # transposed states before each chunk [B, HV, N, V, K]


class Rows(NamedTuple):
    """A chunk's factors that no product reads, [1, C], and γ_C [1, 1]."""

    read_k: Any
    read_q: Any
    write: Any
    gamma: Any


def read_rows(refs: Scores, gamma_ref: Any, i: Any) -> Rows:
    """Reads the row factors of chunk `i`."""
    row = pl.ds(i, 1)
    return Rows(
        refs.read_k[row, :],
        None if refs.read_q is None else refs.read_q[row, :],
        refs.write[row, :],
        gamma_ref[row, CHUNK - 1 : CHUNK],
    )


def with_matrices(refs: Scores, span: Any, rows: Rows) -> Scores:
    """Reads T and Y of the chunk of rows `span`, and joins them with its row factors."""
    scores = None if refs.scores is None else refs.scores[span, :]
    return Scores(refs.inverse[span, :], scores, rows.read_k, rows.read_q, rows.write)


def _transposed(v: jax.Array, through_product: bool) -> jax.Array:
    """Returns Vᵀ in float32, which a product with the identity leaves exact."""
    if not through_product:
        return v.T.astype(jnp.float32)
    i, j = indices(CHUNK)
    return matmul(v, jnp.where(i == j, 1.0, 0.0).astype(v.dtype), TN)


def _body(
    q_ref, k_ref, v_ref, score_refs, gamma_ref, first_ref, out, *, chunks, parts, carried, ahead
):
    columns = out.last.shape[0]

    if carried:  # the state lies in the output block between programs

        @pl.when(pl.program_id(3) == 0)
        def _():
            out.last[...] = first_ref[...]

    start_ref = out.last if carried else first_ref

    # Triton fetches ahead only what products read. So v takes the way through a product, and rows
    # come one chunk early by hand: 0.99 -> 0.82 ms at K = 96. A wider state leaves no registers for
    # it, and without the outputs both only cost.
    ahead = ahead and out.o is not None and k_ref.dtype == jnp.bfloat16

    def chunk(i, carry):
        state, factors = carry
        rows = span(i, CHUNK)
        k = load(k_ref, rows, parts)
        q = None if q_ref is None else load(q_ref, rows, parts)
        if v_ref is None:
            v = jnp.zeros((columns, CHUNK), jnp.float32)
        else:
            v = _transposed(v_ref[rows, :], ahead)
        if out.states is not None:
            for part, x in zip(parts, state, strict=True):
                out.states[i, :, part] = x.astype(out.states.dtype)
        here = factors if ahead else read_rows(score_refs, gamma_ref, i)
        scores = with_matrices(score_refs, rows, here)
        state, news, o = walk_chunk(state, q, k, v, scores, here.gamma)
        if o is not None:
            out.o[rows, :] = o.astype(out.o.dtype).T
        if out.news is not None:
            out.news[rows, :] = news.T
        following = jnp.minimum(i + 1, chunks - 1)
        return state, read_rows(score_refs, gamma_ref, following) if ahead else None

    state = tuple(start_ref[:, part] for part in parts)
    first = read_rows(score_refs, gamma_ref, 0) if ahead else None
    state, _ = jax.lax.fori_loop(0, chunks, chunk, (state, first))
    for part, x in zip(parts, state, strict=True):
        out.last[:, part] = x


def walk(
    kind: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: Scores,
    from_start: jax.Array,
    initial: jax.Array,
    *,
    blocks: Blocks,
) -> Walked:
    """Walks over the chunks.

    Args:
      kind: "output" for o; "states" for N and the states before each chunk; "final" for the last
        state alone; "homogeneous" likewise with v = 0.
      q: queries in the kernels' layout (read for "output" alone).
      k: keys in the kernels' layout.
      v: values in the kernels' layout (not read for "homogeneous").
      scores: of all chunks.
      from_start: γ [B, HV, N, C].
      initial: transposed state before the first chunk [B, HV, V, K] float32.
      blocks: sizes.

    Returns:
      What `kind` asks for; o and N have v's shape and k's dtype.
    """
    batch, heads, count, _ = from_start.shape
    key_heads = k.shape[1 if backend.platform() == "tpu" else 2]
    key_width, width = k.shape[-1], initial.shape[2]
    columns = blocks.v_block or width
    n = blocks.walk_chunks or count
    layout = Layout(heads // key_heads, lambda c, s: s)
    column = lambda c, s: c  # noqa: E731
    keys = layout.rows(n * CHUNK, key_width, value_head=False)
    values = layout.rows(n * CHUNK, columns, column=column)
    matrix, row = layout.per_chunk(n * CHUNK, CHUNK), layout.per_chunk(n, CHUNK)
    state = layout.state(columns, key_width, column)
    states = layout.per_chunk(n, columns, key_width, column=column)

    if kind != "output":
        scores = scores._replace(scores=None, read_q=None)
    inputs = (
        q if kind == "output" else None,
        k,
        v if kind != "homogeneous" else None,
        scores,
        from_start,
        initial,
    )
    specs = (keys, keys, values, Scores(matrix, matrix, row, row, row), row, state)

    rows = row_shape(batch, count * CHUNK, heads, width, k.dtype)
    kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), k.dtype)
    last = jax.ShapeDtypeStruct(initial.shape, jnp.float32)
    out_shape = {
        "output": Walked(last, o=rows),
        "states": Walked(last, news=rows, states=kept),
        "final": Walked(last),
        "homogeneous": Walked(last),
    }[kind]
    warps, stages = blocks.walk if kind == "output" else blocks.states
    (out,) = backend.pallas(
        functools.partial(
            _body,
            chunks=n,
            parts=column_parts(key_width),
            carried=blocks.walk_chunks > 0,
            ahead=blocks.ahead,
        ),
        name=f"gated_delta_walk_{kind}",
        grid=(batch, heads, width // columns, count // n),
        in_specs=_where_given(inputs, specs),
        out_specs=[_where_given(out_shape, Walked(state, values, values, states))],
        out_shape=[out_shape],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=warps,
        num_stages=stages,
    )(*inputs)
    return out


def _where_given(arrays: Any, specs: Any) -> Any:
    """Keeps the specs of the arrays that are there."""
    return jax.tree.map(
        lambda x, spec: None if x is None else spec, arrays, specs, is_leaf=lambda x: x is None
    )
