"""KDA and the DPLR rule in five kernels, with their derivative, on a GPU or a TPU.

    prepare (all chunks)  ->  walk (over the chunks)                          forward
    prepare  ->  walk again for states and U  ->  walk back  ->  gradients of scores, of rows

Mathematics: kernel_math.py and gradient_math.py. Segments and padding are dealt with here, as
decays of zero and rows of zeros. Kept for the backward pass: the inputs and T (64 values a token
and head in q's dtype). What else `prepare` computes is computed again; the states (one a chunk), U
and the gradients of the states live only while the backward pass runs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import backend
from kernels_pallas.dplr.blocks import find_blocks
from kernels_pallas.dplr.gradients import Gradients, Walks, gradients
from kernels_pallas.dplr.prepare import Inputs, Prepared, prepare
from kernels_pallas.dplr.walk import walk
from kernels_pallas.dplr.walk_back import walk_back
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.compose import back_over_stretches, over_stretches
from kernels_pallas.gated_delta_rule.layout import for_kernel
from kernels_pallas.gated_delta_rule.pallas import V_UNIT, check_supported
from kernels_pallas.gated_delta_rule.segmented import (
    by_row,
    by_segment,
    count_segments,
    ordinals_over_devices,
    pad_time,
)
from kernels_pallas.half_chunks import with_beyond
from kernels_pallas.pair_gradients import pair_gradients
from kernels_pallas.vector_decay import with_borders


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    blocks: Blocks
    inverse: str  # the name that remat policies know T by
    segments: int  # that T is cut into, which are rows of the batch
    axis_name: str | None  # the mesh axis that T is split over


class Rows(NamedTuple):
    """Inputs of the rule, padded, [B, T, H, ·]; KDA has factors and β, the DPLR rule a and b."""

    q: Any
    k: Any
    v: Any
    a: Any
    b: Any
    g: Any
    factors: Any  # of q, a and b: [B, H, N, C]
    beta: Any  # [B, H, N, C]


class Kept(NamedTuple):
    """What the backward pass needs."""

    rows: Rows
    initial: jax.Array  # transposed states before the segments
    inverse: jax.Array  # T
    transitions: jax.Array | None  # of the segments, where T is split


def start(
    q: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    chunk_size: int,
    inverse: str,
    axis_name: str | None,
    blocks: Blocks | None,
) -> Options:
    """Refuses what the kernels do not take, and finds the options."""
    check_supported(q, v, chunk_size)
    blocks = find_blocks(backend.platform(), q.shape[-1]) if blocks is None else blocks
    batch, length, heads, width = v.shape
    programs = batch * heads * -(-width // (blocks.v_block or width))
    segments = count_segments(programs, length, enough=blocks.enough, most=blocks.programs)
    return Options(scale, blocks, inverse, segments, axis_name)


def borders_of(
    options: Options, segment_ids: Int[Array, "B T"] | None
) -> tuple[jax.Array | None, jax.Array | None]:
    """Returns `ordinals` and `before` of `vector_decay.with_borders`."""
    if segment_ids is None or options.axis_name is None:
        return None, None
    return ordinals_over_devices(segment_ids, options.axis_name)


def padded(
    options: Options,
    v: Float[Array, "B T H V"],
    rows: list[Float[Array, "B T ..."]],
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[list[jax.Array], jax.Array]:
    """Pads T to whole programs and V to what tensor cores take, and cuts T into segments.

    Args:
      options: the options.
      v: values.
      rows: other inputs, first of all g, whose segments get their borders here. The others are set
        to 0 at padding, as v is.
      initial_state: the state before the first token; None is zeros.
      segment_ids: 0 for padding, or None.

    Returns:
      v and the rows, [B·segments, T, ...], and the transposed state [B, H, V, K] float32.
    """
    batch, length, heads, width = v.shape
    blocks, segments = options.blocks, options.segments
    g, *others = rows
    g = with_borders(g.astype(jnp.float32), segment_ids, *borders_of(options, segment_ids))
    if segment_ids is not None:
        real = segment_ids != 0
        others = [jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0) for x in others]
        v = jnp.where(real[..., None, None], v, 0)
    # Padding changes nothing: rows of zeros write nothing, g = 0 decays nothing.
    extra = -length % (CHUNK * segments * max(blocks.chunks, blocks.walk_chunks))
    missing = -width % V_UNIT if backend.platform() != "tpu" else 0
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing)))
    rows = [pad_time(x, extra) for x in (v, g, *others)]
    rows = [x.reshape(batch * segments, -1, *x.shape[2:]) for x in rows]
    state = jnp.zeros((batch, heads, g.shape[-1], width), jnp.float32)
    state = state if initial_state is None else initial_state.astype(jnp.float32)
    state = jnp.pad(jnp.swapaxes(state, 2, 3), ((0, 0), (0, 0), (0, missing), (0, 0)))
    return rows, state


def unpadded(
    o: jax.Array,
    state: jax.Array,
    like: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Joins and cuts o and the state to the size of the values `like`; o is 0 at padding."""
    o = o.reshape(like.shape[0], -1, *o.shape[2:])[:, : like.shape[1], :, : like.shape[3]]
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return o, jnp.swapaxes(state, 2, 3)[..., : like.shape[3]].astype(state_dtype)


def _inputs(rows: Rows) -> Inputs:
    def give(x):
        return None if x is None else for_kernel(x)

    q, k, a, b, g = (give(x) for x in (rows.q, rows.k, rows.a, rows.b, rows.g))
    return Inputs(q, k, a, b, g, rows.factors)


def _is_split(options: Options) -> bool:
    return options.segments > 1 or options.axis_name is not None


def _segment_states(options: Options, x: Prepared, v: jax.Array, state: jax.Array):
    """Returns the state before every segment, the one after all, and the segments' transitions."""
    blocks, key_width = options.blocks, x.whole.shape[-1]
    rows = x.whole.shape[:2]
    zeros = jnp.zeros((*rows, *state.shape[2:]), jnp.float32)
    n = walk("final", x, v, zeros, blocks=blocks).last
    # M is what the rule makes of the identity when nothing is written.
    unit = -key_width % V_UNIT if blocks.v_block else 0
    eye = jnp.pad(jnp.eye(key_width, dtype=jnp.float32), ((0, unit), (0, 0)))
    m = walk("homogeneous", x, None, jnp.broadcast_to(eye, (*rows, *eye.shape)), blocks=blocks).last
    m, n = (by_segment(y, options.segments) for y in (m[:, :, :key_width], n))
    before, last = over_stretches(m, n, state, options.axis_name)
    return by_row(before), last, m


def forward(options: Options, rows: Rows, state: jax.Array) -> tuple[Any, Any]:
    """Returns o and the transposed state, and what the backward pass keeps."""
    inputs, v = _inputs(rows), for_kernel(rows.v)
    x = prepare(inputs, blocks=options.blocks, scale=options.scale)
    inverse = checkpoint_name(x.squares.t, options.inverse)
    x = x._replace(squares=x.squares._replace(t=inverse))
    initial, last, transitions = state, None, None
    if _is_split(options):
        initial, last, transitions = _segment_states(options, x, v, state)
    out = walk("output", x, v, initial, blocks=options.blocks)
    last = out.last if last is None else last
    return (for_kernel(out.o), last), Kept(rows, initial, inverse, transitions)


def kernel_gradients(
    options: Options, kept: Kept, do: jax.Array, dlast: Any
) -> tuple[Gradients, jax.Array, jax.Array, jax.Array]:
    """Runs the backward kernels.

    Returns:
      The gradients of q, k, a, b, g and β [B, T, H, ·], that of v, and that of the state; and the
      diagonal of dR Uᵀ, in KDA β times its gradient.
    """
    blocks, rows = options.blocks, kept.rows
    inputs, v, do = _inputs(rows), for_kernel(rows.v), for_kernel(do.astype(rows.v.dtype))
    x = prepare(inputs, blocks=blocks, scale=options.scale, inverse=kept.inverse)
    walked = walk("states", x, v, kept.initial, blocks=blocks)
    dfirst = None
    if kept.transitions is not None:
        zeros = jnp.zeros((do.shape[0], *dlast.shape[1:]), jnp.float32)
        n = walk_back(x, do, zeros, store=False, blocks=blocks).first
        n = by_segment(n, options.segments)
        dlast, dfirst = back_over_stretches(kept.transitions, n, dlast, options.axis_name)
        dlast = by_row(dlast)
    back = walk_back(x, do, dlast, store=True, blocks=blocks)
    dfirst = back.first if dfirst is None else dfirst
    is_kda = rows.a is None
    walks = Walks(do, back.r, walked.u, None if is_kda else v, walked.states, back.states)
    pairs = pair_gradients(
        (walks.do, walks.dr),
        (walks.u,) if is_kda else (walks.u, walks.v),
        # In two pieces by b: where keys resemble each other large gradients cancel.
        (2,) if is_kda else (2, 1),
        name="kda_pair_gradients" if is_kda else "dplr_pair_gradients",
        chunk_size=CHUNK,
        chunks=blocks.chunks,
        v_step=blocks.v_step,
        schedule=blocks.pairs,
    )
    d = gradients(
        inputs,
        walks,
        pairs,
        rows.beta,
        blocks=blocks,
        scale=options.scale,
        dtype=jnp.float32 if is_kda else rows.q.dtype,
    )
    # The row factors of β have one layout everywhere.
    q, k, a, b = (None if y is None else for_kernel(y) for y in d[:4])
    g = with_beyond(for_kernel(d.g), d.beyond)
    dv = for_kernel(back.r if is_kda else back.v)
    return Gradients(q, k, a, b, g, None, d.beta), dv, dfirst, pairs.own[1][0]


def _backward(options: Options, kept: Kept, cotangents):
    d, dv, dfirst, _ = kernel_gradients(options, kept, *cotangents)
    dq = (options.scale * d.q.astype(jnp.float32)).astype(kept.rows.q.dtype)
    return Rows(dq, d.k, dv, d.a, d.b, d.g, None, None), dfirst


def outputs(options: Options, rows: Rows, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns o [B, T, H, V] and the transposed state [B, H, V, K]."""
    return forward(options, rows, state)[0]


rule = jax.custom_vjp(outputs, nondiff_argnums=(0,))
rule.defvjp(forward, _backward)
