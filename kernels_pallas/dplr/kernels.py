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
from kernels_pallas.dplr.prepare import Inputs, prepare
from kernels_pallas.dplr.walk import walk
from kernels_pallas.dplr.walk_back import walk_back
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.layout import for_kernel
from kernels_pallas.gated_delta_rule.pallas import V_UNIT, check_supported
from kernels_pallas.half_chunks import with_beyond
from kernels_pallas.pair_gradients import pair_gradients
from kernels_pallas.vector_decay import with_borders


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    blocks: Blocks
    inverse: str  # the name that remat policies know T by


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


def padded(
    v: Float[Array, "B T H V"],
    rows: list[Float[Array, "B T ..."]],
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    key_width: int,
    blocks: Blocks,
) -> tuple[list[jax.Array], jax.Array]:
    """Pads T to whole programs and V to what tensor cores take.

    Args:
      v: values.
      rows: other inputs, first of all g, whose segments get their borders here. The others are set
        to 0 at padding, as v is.
      initial_state: the state before the first token; None is zeros.
      segment_ids: 0 for padding, or None.
      key_width: K.
      blocks: sizes.

    Returns:
      v and the rows, and the transposed state [B, H, V, K] float32.
    """
    batch, length, heads, width = v.shape
    g, *others = rows
    g = with_borders(g.astype(jnp.float32), segment_ids)
    if segment_ids is not None:
        real = segment_ids != 0
        others = [jnp.where(real.reshape(*real.shape, *[1] * (x.ndim - 2)), x, 0) for x in others]
        v = jnp.where(real[..., None, None], v, 0)
    # Padding changes nothing: rows of zeros write nothing, g = 0 decays nothing.
    extra = -length % (CHUNK * max(blocks.chunks, blocks.walk_chunks))
    missing = -width % V_UNIT if backend.platform() != "tpu" else 0
    v = jnp.pad(v, ((0, 0), (0, extra), (0, 0), (0, missing)))
    rows = [jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2)) for x in (g, *others)]
    state = jnp.zeros((batch, heads, key_width, width), jnp.float32)
    state = state if initial_state is None else initial_state.astype(jnp.float32)
    state = jnp.pad(jnp.swapaxes(state, 2, 3), ((0, 0), (0, 0), (0, missing), (0, 0)))
    return [v, *rows], state


def unpadded(
    o: jax.Array,
    state: jax.Array,
    like: Float[Array, "B T H V"],
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Cuts o and the state to the size of the values `like`, and zeroes o at padding."""
    o = o[:, : like.shape[1], :, : like.shape[3]]
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return o, jnp.swapaxes(state, 2, 3)[..., : like.shape[3]].astype(state_dtype)


def start(
    q: jax.Array, v: jax.Array, chunk_size: int, axis_name: str | None, blocks: Blocks | None
) -> Blocks:
    """Refuses what the kernels do not take, and finds their blocks."""
    check_supported(q, v, chunk_size)
    if axis_name is not None:
        raise NotImplementedError("the kernels do not split T over devices (axis_name)")
    return find_blocks(backend.platform(), q.shape[-1]) if blocks is None else blocks


def _inputs(rows: Rows) -> Inputs:
    def give(x):
        return None if x is None else for_kernel(x)

    q, k, a, b, g = (give(x) for x in (rows.q, rows.k, rows.a, rows.b, rows.g))
    return Inputs(q, k, a, b, g, rows.factors)


def forward(options: Options, rows: Rows, state: jax.Array) -> tuple[Any, Any]:
    """Returns o and the transposed state, and what the backward pass keeps."""
    inputs = _inputs(rows)
    x = prepare(inputs, blocks=options.blocks, scale=options.scale)
    inverse = checkpoint_name(x.squares.t, options.inverse)
    x = x._replace(squares=x.squares._replace(t=inverse))
    out = walk("output", x, for_kernel(rows.v), state, blocks=options.blocks)
    return (for_kernel(out.o), out.last), (rows, state, inverse)


def kernel_gradients(
    options: Options, rows: Rows, state: jax.Array, inverse: jax.Array, do: jax.Array, dlast: Any
) -> tuple[Gradients, jax.Array, jax.Array, jax.Array]:
    """Runs the backward kernels.

    Returns:
      The gradients of q, k, a, b, g and β [B, T, H, ·], that of v, and that of the state; and the
      diagonal of dR Uᵀ, in KDA β times its gradient.
    """
    blocks = options.blocks
    inputs, v, do = _inputs(rows), for_kernel(rows.v), for_kernel(do.astype(rows.v.dtype))
    x = prepare(inputs, blocks=blocks, scale=options.scale, inverse=inverse)
    walked = walk("states", x, v, state, blocks=blocks)
    back = walk_back(x, do, dlast, blocks=blocks)
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
    q, k, a, b, g = (None if y is None else for_kernel(y) for y in d[:5])
    g = with_beyond(g, d.beyond)
    dv = for_kernel(back.r if is_kda else back.v)
    return Gradients(q, k, a, b, g, None, d.beta), dv, back.first, pairs.own[1][0]


def _backward(options: Options, residuals, cotangents):
    rows, state, inverse = residuals
    d, dv, dfirst, _ = kernel_gradients(options, rows, state, inverse, *cotangents)
    dq = (options.scale * d.q.astype(jnp.float32)).astype(rows.q.dtype)
    return Rows(dq, d.k, dv, d.a, d.b, d.g, None, None), dfirst


def outputs(options: Options, rows: Rows, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns o [B, T, H, V] and the transposed state [B, H, V, K]."""
    return forward(options, rows, state)[0]


rule = jax.custom_vjp(outputs, nondiff_argnums=(0,))
rule.defvjp(forward, _backward)
