"""Second kernel: the walk over the chunks that carries the state.

    N = T (V − f (K S))      O = h (Q S) + P' N      S <- γ_C S + Kᵀ (w N)

(kernel_math.py has the notation.) One program takes some columns of V of one value head (64 on a
GPU, all on a TPU) from the first chunk to the last: they do not depend on each other. It holds
Sᵀ [v, K] in float32 registers; each product's left operand is what the last one left there, its
right one (K, T, Q, P') comes through shared memory, fetched while the chunk before is worked on.
A TPU program holds `walk_chunks` chunks at a time and the state in its output block, which stays
in VMEM from one to the next.

Read: v once; k, q, T and P' by every program of a head, from L2 but for the first. Written: o, and
for the backward pass the state before each chunk (K·V / C values a token) and N instead of o.
Bytes at K = 96, V = 256: 1.9 KB a token and head with o, 2.6 KB with states and N.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import Scores, walk_chunk
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, row_shape, span


def _body(*refs, kind, chunks, parts, carried):
    refs = list(refs)
    take = lambda present: refs.pop(0) if present else None  # noqa: E731
    q_ref = take(kind == "output")
    k_ref = take(True)
    v_ref = take(kind != "homogeneous")
    t_ref, p_ref = take(True), take(kind == "output")
    f_ref, h_ref, w_ref = take(True), take(kind == "output"), take(True)
    gamma_ref, first_ref, last_ref = take(True), take(True), take(True)
    o_ref, news_ref, states_ref = (
        take(kind == "output"),
        take(kind == "states"),
        take(kind == "states"),
    )
    columns = last_ref.shape[0]

    if carried:  # the state lies in the output block between programs

        @pl.when(pl.program_id(3) == 0)
        def _():
            last_ref[...] = first_ref[...]

    start_ref = last_ref if carried else first_ref

    def chunk(i, state):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        k = load(k_ref, rows, parts)
        q = None if q_ref is None else load(q_ref, rows, parts)
        if v_ref is None:
            v = jnp.zeros((columns, CHUNK), jnp.float32)
        else:
            v = v_ref[rows, :].T.astype(jnp.float32)
        scores = Scores(
            t_ref[rows, :],
            None if p_ref is None else p_ref[rows, :],
            f_ref[row, :],
            None if h_ref is None else h_ref[row, :],
            w_ref[row, :],
        )
        if states_ref is not None:
            for part, x in zip(parts, state, strict=True):
                states_ref[i, :, part] = x.astype(states_ref.dtype)
        state, news, o = walk_chunk(state, q, k, v, scores, gamma_ref[row, CHUNK - 1 : CHUNK])
        if o_ref is not None:
            o_ref[rows, :] = o.astype(o_ref.dtype).T
        if news_ref is not None:
            news_ref[rows, :] = news.T
        return state

    state = tuple(start_ref[:, part] for part in parts)
    state = jax.lax.fori_loop(0, chunks, chunk, state)
    for part, x in zip(parts, state, strict=True):
        last_ref[:, part] = x


def walk(
    kind: str,
    q: jax.Array | None,
    k: jax.Array,
    v: jax.Array | None,
    scores: Scores,
    from_start: jax.Array,
    initial: jax.Array,
    *,
    blocks: Blocks,
) -> tuple[jax.Array, ...]:
    """Walks over the chunks.

    Args:
      kind: "output" for o; "states" for N and the states before each chunk; "final" for the last
        state alone; "homogeneous" likewise with v = 0.
      q: queries in the kernels' layout, for "output".
      k: keys in the kernels' layout.
      v: values in the kernels' layout, but for "homogeneous".
      scores: of all chunks.
      from_start: γ [B, HV, N, C].
      initial: transposed state before the first chunk [B, HV, V, K] float32.
      blocks: sizes.

    Returns:
      The transposed state after the last chunk [B, HV, V, K] float32, and for "output" o in v's
      shape and dtype; for "states" N likewise and the transposed states [B, HV, N, V, K].
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

    inputs = [(keys, k), (values, v), (matrix, scores.inverse), (row, scores.read_k)]
    inputs += [(row, scores.write), (row, from_start), (state, initial)]
    if kind == "output":
        inputs.insert(0, (keys, q))
        inputs.insert(4, (matrix, scores.scores))
        inputs.insert(6, (row, scores.read_q))
    inputs = [(spec, x) for spec, x in inputs if x is not None]

    outputs = [(state, jax.ShapeDtypeStruct(initial.shape, jnp.float32))]
    rows = row_shape(batch, count * CHUNK, heads, width, k.dtype)
    if kind in ("output", "states"):
        outputs.append((values, rows))
    if kind == "states":
        spec = layout.per_chunk(n, columns, key_width, column=column)
        shape = (batch, heads, count, width, key_width)
        outputs.append((spec, jax.ShapeDtypeStruct(shape, k.dtype)))

    warps, stages = blocks.walk if kind == "output" else blocks.states
    return backend.pallas(
        functools.partial(
            _body,
            kind=kind,
            chunks=n,
            parts=column_parts(key_width),
            carried=blocks.walk_chunks > 0,
        ),
        name=f"gated_delta_walk_{kind}",
        grid=(batch, heads, width // columns, count // n),
        in_specs=[spec for spec, _ in inputs],
        out_specs=[spec for spec, _ in outputs],
        out_shape=[shape for _, shape in outputs],
        sequential=1,
        fastest_first=(2, 1, 0, 3),
        num_warps=warps,
        num_stages=stages,
    )(*(x for _, x in inputs))
