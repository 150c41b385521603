"""Linear attention in kernels, with its derivative, on a GPU or a TPU.

    terms (all chunks)  ->  walk (over the chunks)                     forward
    terms  ->  walk again for states  ->  walk back  ->  gradients     backward

Mathematics: chunks.py. Terms are Y alone for one decay a head (head_kernels.py), and Q̂, K_e and Y
for one a key channel (channel_kernels.py). Segments and padding are in the decays and in q and k,
which are 0 at padding. Kept for the backward pass: the inputs, and one state a segment where T is
cut. Terms and states (one a chunk) live only while a pass runs.

Where a batch has few heads, T is cut into segments that walk side by side (split.py); with
`axis_name` the same composition crosses devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.gates import decay_gradient, from_rows, gate_rows
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
from kernels_pallas.linear_attention import split
from kernels_pallas.linear_attention.blocks import CHUNK, Blocks, find_blocks
from kernels_pallas.linear_attention.channel_kernels import (
    channel_kernel_gradients,
    channel_terms,
)
from kernels_pallas.linear_attention.head_kernels import (
    DecayRows,
    head_gradients,
    head_scores,
)
from kernels_pallas.linear_attention.kernel_terms import Terms
from kernels_pallas.linear_attention.walk import walk
from kernels_pallas.linear_attention.walk_back import walk_back
from kernels_pallas.vector_decay import with_borders


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    axis_name: str | None
    blocks: Blocks
    segments: int


def linear_attention_pallas(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None,
    *,
    scale: float | None,
    initial_state: Float[Array, "B HV K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence in kernels; `blocks` overrides the table of blocks.py."""
    check_supported(q, v, chunk_size)
    batch, length, heads, width = v.shape
    key_width = k.shape[-1]
    if blocks is None:
        blocks = find_blocks(backend.platform(), q.shape[-1])
    if g is None:
        g = jnp.zeros((batch, length, heads), jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, key_width, width), jnp.float32)
    factor = key_width**-0.5 if scale is None else float(scale)
    programs = batch * heads * -(-width // (blocks.v_block or width))
    segments = count_segments(programs, length, enough=blocks.enough, most=blocks.programs)
    options = Options(factor, axis_name, blocks, segments)
    o, state = _attention(options, q, k, v, g, initial_state, segment_ids)
    return o, state.astype(state_dtype)


class _Inputs(NamedTuple):
    """The kernels' inputs: whole chunks, segments of T as rows of the batch, their layout."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array  # [B·S, T/S, HV], or in the kernels' layout with one decay a channel
    state: jax.Array  # transposed [B, HV, V, K]


def _rows(options: Options, x: jax.Array) -> jax.Array:
    """Pads T to whole chunks and makes its segments rows of the batch."""
    blocks, segments = options.blocks, options.segments
    unit = CHUNK * segments * max(blocks.chunks, blocks.walk_chunks)
    x = pad_time(x, -x.shape[1] % unit)
    return x.reshape(x.shape[0] * segments, -1, *x.shape[2:])


def _missing(width: int) -> int:
    """Columns that V lacks to what a GPU's tensor cores take at a time."""
    return -width % V_UNIT if backend.platform() != "tpu" else 0


def _values(options: Options, v: jax.Array) -> jax.Array:
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, _missing(v.shape[-1]))))
    return for_kernel(_rows(options, v))


def _transposed(state: jax.Array) -> jax.Array:
    state = jnp.swapaxes(state.astype(jnp.float32), 2, 3)
    return jnp.pad(state, ((0, 0), (0, 0), (0, _missing(state.shape[2])), (0, 0)))


def _prepare(options: Options, segment_ids, q, k, v, g, state) -> _Inputs:
    ordinals = before = None
    if segment_ids is not None:
        if options.axis_name is not None:
            ordinals, before = ordinals_over_devices(segment_ids, options.axis_name)
        # What reads nothing and writes nothing changes nothing, nor has it gradients; and 0 times
        # whatever lies there must be 0.
        q, k, v = (jnp.where((segment_ids != 0)[..., None, None], x, 0) for x in (q, k, v))
    has_channels = g.ndim == 4
    g = g.astype(jnp.float32) if has_channels else g.astype(jnp.float32)[..., None]
    g = _rows(options, with_borders(g, segment_ids, ordinals, before))
    g = for_kernel(g) if has_channels else g[..., 0]
    q, k = (for_kernel(_rows(options, x)) for x in (q, k))
    return _Inputs(q, k, _values(options, v), g, _transposed(state))


def _terms(options: Options, x: _Inputs) -> Terms:
    if x.g.ndim == 4:
        return channel_terms(x.q, x.k, x.g, scale=options.scale, blocks=options.blocks)
    decays = _decay_rows(x.g)
    scores = head_scores(x.q, x.k, decays, scale=options.scale, blocks=options.blocks)
    read_factor, whole = options.scale * decays.from_start, decays.from_start[..., -1:]
    return Terms(x.q, read_factor, x.k, decays.to_end, scores, whole)


def _decay_rows(g: jax.Array) -> DecayRows:
    gates = gate_rows(g, g, CHUNK)
    return DecayRows(gates.coarse, gates.fine, gates.from_start, gates.to_end)


def _is_split(options: Options) -> bool:
    return options.segments > 1 or options.axis_name is not None


def _transitions(options: Options, terms: Terms, n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns decay and N of every segment."""
    w = jnp.prod(terms.whole, axis=2)
    return by_segment(w, options.segments), by_segment(n, options.segments)


def _forward(options: Options, q, k, v, g, initial_state, segment_ids):
    x = _prepare(options, segment_ids, q, k, v, g, initial_state)
    terms = _terms(options, x)
    first, last = x.state, None
    if _is_split(options):
        zeros = jnp.zeros((x.v.shape[0], *x.state.shape[1:]), jnp.float32)
        n = walk("final", terms, x.v, zeros, blocks=options.blocks).last
        w, n = _transitions(options, terms, n)
        if options.axis_name is None:
            first, last = split.states_before(w, n, x.state)
        else:
            first, last = split.states_over_devices(w, n, x.state, options.axis_name)
        first = by_row(first)
    out = walk("output", terms, x.v, first, blocks=options.blocks)
    last = out.last if last is None else last
    o = for_kernel(out.o)
    o = o.reshape(v.shape[0], -1, *o.shape[2:])[:, : v.shape[1], :, : v.shape[3]]
    state = jnp.swapaxes(last, 2, 3)[..., : v.shape[3]]
    kept = first if _is_split(options) else None
    return (o, state), (q, k, v, g, initial_state, segment_ids, kept)


def _backward(options: Options, residuals, cotangents):
    q, k, v, g, initial_state, segment_ids, first = residuals
    blocks = options.blocks

    def prepare(q, k, v, g, state):
        return _prepare(options, segment_ids, q, k, v, g, state)

    x, pull = jax.vjp(prepare, q, k, v, g, initial_state)
    do, dlast = cotangents
    do, dlast = _values(options, do), _transposed(dlast)
    terms = _terms(options, x)
    states = walk("states", terms, x.v, x.state if first is None else first, blocks=blocks).states
    dfirst = None
    if first is not None:
        nothing = jnp.zeros((x.v.shape[0], *dlast.shape[1:]), jnp.float32)
        n = walk_back(terms, do, nothing, store=False, blocks=blocks).first
        w, n = _transitions(options, terms, n)
        if options.axis_name is None:
            dlast, dfirst = split.gradients_after(w, n, dlast)
        else:
            dlast, dfirst = split.gradients_over_devices(w, n, dlast, options.axis_name)
        dlast = by_row(dlast)
    back = walk_back(terms, do, dlast, store=True, blocks=blocks)
    dfirst = back.first if dfirst is None else dfirst
    dq, dk, dg = _row_gradients(options, x, do, states, back.states)
    return *pull(_Inputs(dq, dk, back.v, dg, dfirst)), None


def _row_gradients(options: Options, x: _Inputs, do, states, dstates):
    """Returns the gradients of the kernels' q, k and g."""
    heads = do.shape[1 if backend.platform() == "tpu" else 2]
    key_heads = x.q.shape[1 if backend.platform() == "tpu" else 2]
    groups = heads // key_heads
    dtype = x.q.dtype if groups == 1 else jnp.float32
    rest = x.v, do, states, dstates
    scale, blocks = options.scale, options.blocks
    if x.g.ndim == 4:
        found = channel_kernel_gradients(
            x.q, x.k, x.g, *rest, scale=scale, blocks=blocks, dtype=dtype
        )
        dq, dk, dg = found.q, found.k, with_beyond(found.g, found.beyond)
    else:
        found = head_gradients(
            x.q, x.k, _decay_rows(x.g), *rest, scale=scale, blocks=blocks, dtype=dtype
        )
        dq, dk = found.q, found.k
        # The gated delta rule's sum over spans, where everything is written with strength 1.
        gates = gate_rows(x.g, jnp.ones_like(x.g), CHUNK)
        dg = decay_gradient(gates, found.pairs, found.from_start, found.to_end, found.inner[..., 0])
        dg = from_rows(dg)

    def of_key_heads(rows):
        if groups == 1:
            return rows
        axis = 1 if backend.platform() == "tpu" else 2
        shape = (*rows.shape[:axis], key_heads, groups, *rows.shape[axis + 1 :])
        return jnp.sum(rows.reshape(shape), axis=axis + 1).astype(x.q.dtype)

    return of_key_heads(dq), of_key_heads(dk), dg


def _outputs(options: Options, q, k, v, g, initial_state, segment_ids):
    return _forward(options, q, k, v, g, initial_state, segment_ids)[0]


_attention = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_attention.defvjp(_forward, _backward)
