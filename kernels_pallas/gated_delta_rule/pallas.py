"""The gated delta rule in four kernels, with its derivative, on a GPU or a TPU.

    scores (all chunks)  ->  walk (over the chunks)                          forward
    scores  ->  walk again for states and N  ->  walk back  ->  gradients    backward

Mathematics: kernel_math.py. Segments, padding and the decays' exponents are dealt with in gates.py.
Kept for the backward pass: the inputs and T (64 values a token and head, named
"gated_delta_rule_inverse" for remat policies), and one state a segment where T is cut. Y, the
states (one a chunk) and N live only while the backward pass runs.

Some of them have a twin for Triton proper, which is taken where it is faster (drivers.py).

Where a batch has few heads, T is cut into segments that walk side by side (compose.py); with
`axis_name` the same composition crosses devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule import compose, drivers
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks, find_blocks
from kernels_pallas.gated_delta_rule.gates import bordered, from_rows, gate_rows
from kernels_pallas.gated_delta_rule.kernel_math import Scores
from kernels_pallas.gated_delta_rule.layout import for_kernel
from kernels_pallas.gated_delta_rule.scores import scores
from kernels_pallas.gated_delta_rule.segmented import (
    by_row,
    by_segment,
    count_segments,
    ordinals_over_devices,
    pad_time,
)

INVERSE = "gated_delta_rule_inverse"  # the name that remat policies know T by
V_UNIT = 64  # columns of V that a GPU's tensor cores take at a time


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    use_qk_l2norm: bool
    axis_name: str | None
    blocks: Blocks
    segments: int
    driver: str


def gated_delta_rule_pallas(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"] | None,
    beta: Float[Array, "B T HV"],
    *,
    scale: float | None,
    initial_state: Float[Array, "B HV K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    use_qk_l2norm: bool,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence in kernels; `blocks` overrides the table of blocks.py."""
    check_supported(q, v, chunk_size)
    batch, length, heads, width = v.shape
    key_width = k.shape[-1]
    platform = backend.platform()
    blocks = find_blocks(platform, key_width) if blocks is None else blocks
    driver = drivers.choose(blocks, v.dtype, key_width)

    ordinals = before = None
    if segment_ids is not None and axis_name is not None:
        ordinals, before = ordinals_over_devices(segment_ids, axis_name)
    g, beta = bordered(g, beta, segment_ids, ordinals, before)
    # Padding changes nothing: β = 0 writes nothing, g = 0 decays nothing.
    programs = batch * heads * -(-width // (blocks.v_block or width))
    segments = count_segments(programs, length, enough=blocks.enough, most=blocks.programs)
    unit = CHUNK * segments * max(blocks.chunks, blocks.walk_chunks)
    q, k, v, g, beta = (pad_time(x, -length % unit) for x in (q, k, v, g, beta))
    missing = -width % V_UNIT if platform != "tpu" else 0
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, missing)))
    # Segments become rows of the batch.
    fold = lambda x: x.reshape(batch * segments, -1, *x.shape[2:])  # noqa: E731
    q, k, v, g, beta = (fold(x) for x in (q, k, v, g, beta))
    state = jnp.zeros((batch, heads, key_width, width), jnp.float32)
    state = state if initial_state is None else initial_state.astype(jnp.float32)
    state = jnp.pad(jnp.swapaxes(state, 2, 3), ((0, 0), (0, 0), (0, missing), (0, 0)))

    factor = key_width**-0.5 if scale is None else float(scale)
    options = Options(factor, use_qk_l2norm, axis_name, blocks, segments, driver)
    o, state = _rule(options, q, k, v, g, beta, state)
    o = o.reshape(batch, -1, *o.shape[2:])[:, :length, :, :width]
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return o, jnp.swapaxes(state, 2, 3)[..., :width].astype(state_dtype)


def check_supported(q: jax.Array, v: jax.Array, chunk_size: int) -> None:
    """Raises NotImplementedError, with the reason, for what the kernels do not take."""
    if chunk_size != CHUNK:
        raise NotImplementedError(f"chunk_size={chunk_size}: the kernels work in chunks of {CHUNK}")
    if v.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"q, k and v are {v.dtype}: the kernels take bfloat16 or float32")
    key_width, width = q.shape[-1], v.shape[-1]
    if key_width % 32 or not 64 <= key_width <= 256:
        raise NotImplementedError(f"K={key_width}: the kernels take multiples of 32 from 64 to 256")
    if v.dtype == jnp.float32 and key_width >= 128 and backend.platform() == "gpu":
        raise NotImplementedError(
            f"K={key_width} in float32: products in three TF32 passes need more shared memory and "
            "registers than a GPU has; bfloat16 fits"
        )
    if width % 16 or not 64 <= width <= 1024:
        raise NotImplementedError(f"V={width}: the kernels take multiples of 16 from 64 to 1024")


def _initial_states(options: Options, q, k, v, s: Scores, from_start, state):
    """Returns the state before every segment, the one after all, and the segments' transitions."""
    run = drivers.kernels(options.driver)
    rows, heads, key_width = v.shape[0], from_start.shape[1], k.shape[-1]
    width = state.shape[2]
    zeros = jnp.zeros((rows, heads, width, key_width), jnp.float32)
    n = run.walk("final", q, k, v, s, from_start, zeros, blocks=options.blocks).last
    # M is what the rule makes of the identity when nothing is written.
    unit = -key_width % V_UNIT if options.blocks.v_block else 0
    eye = jnp.pad(jnp.eye(key_width, dtype=jnp.float32), ((0, unit), (0, 0)))
    eye = jnp.broadcast_to(eye, (rows, heads, *eye.shape))
    x = run.walk("homogeneous", q, k, v, s, from_start, eye, blocks=options.blocks).last
    x, n = (by_segment(y, options.segments) for y in (x[:, :, :key_width], n))
    before, last = compose.over_stretches(x, n, state, options.axis_name)
    return before, last, x


def _scores(options: Options, q, k, gates, inverse=None) -> Scores:
    return scores(
        q,
        k,
        gates,
        blocks=options.blocks,
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        inverse=inverse,
    )


def _is_split(options: Options) -> bool:
    return options.segments > 1 or options.axis_name is not None


def _forward(options: Options, q, k, v, g, beta, state):
    run = drivers.kernels(options.driver)
    gates = gate_rows(g, beta, CHUNK)
    q, k, v = (for_kernel(x) for x in (q, k, v))
    s = _scores(options, q, k, gates)
    s = s._replace(inverse=checkpoint_name(s.inverse, INVERSE))
    from_start = gates.from_start
    split = None
    last = None
    initial = state
    if _is_split(options):
        before, last, x = _initial_states(options, q, k, v, s, from_start, state)
        initial = by_row(before)
        split = (initial, x)
    out = run.walk("output", q, k, v, s, from_start, initial, blocks=options.blocks)
    last = out.last if last is None else last
    return (for_kernel(out.o), last), (q, k, v, g, beta, state, s.inverse, split)


def _backward(options: Options, residuals, cotangents):
    q, k, v, g, beta, state, inverse, split = residuals
    do, dlast = cotangents
    blocks = options.blocks
    run = drivers.kernels(options.driver)
    gates = gate_rows(g, beta, CHUNK)
    from_start = gates.from_start
    do = for_kernel(do.astype(v.dtype))
    s = _scores(options, q, k, gates, inverse)
    initial = state if split is None else split[0]
    walked = run.walk("states", q, k, v, s, from_start, initial, blocks=blocks)

    dfirst = None
    if split is not None:
        dlast, dfirst = _last_gradients(options, q, k, do, s, from_start, dlast, split[1])
    back = run.walk_back(q, k, do, s, from_start, dlast, store=True, blocks=blocks)
    dfirst = back.first if dfirst is None else dfirst

    groups = beta.shape[2] // (q.shape[1] if backend.platform() == "tpu" else q.shape[2])
    dtype = q.dtype if groups == 1 else jnp.float32
    dq, dk, dg, dbeta = run.gradients(
        q,
        k,
        gates,
        walked.news,
        back.v,
        do,
        walked.states,
        back.states,
        blocks=blocks,
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        dtype=dtype,
    )

    def of_key_heads(x):
        x = for_kernel(x)
        if groups == 1:
            return x
        return jnp.sum(x.reshape(*x.shape[:2], -1, groups, x.shape[-1]), axis=3).astype(q.dtype)

    dq, dk = of_key_heads(dq), of_key_heads(dk)
    return dq, dk, for_kernel(back.v), from_rows(dg), from_rows(dbeta), dfirst


def _last_gradients(options: Options, q, k, do, s: Scores, from_start, dlast, x):
    """Returns the gradient of the state after every segment, and that of the initial state."""
    run = drivers.kernels(options.driver)
    zeros = jnp.zeros((do.shape[0], *dlast.shape[1:]), jnp.float32)
    n = run.walk_back(q, k, do, s, from_start, zeros, store=False, blocks=options.blocks).first
    n = by_segment(n, options.segments)
    after, first = compose.back_over_stretches(x, n, dlast, options.axis_name)
    return by_row(after), first


def _outputs(options: Options, q, k, v, g, beta, state):
    return _forward(options, q, k, v, g, beta, state)[0]


_rule = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
