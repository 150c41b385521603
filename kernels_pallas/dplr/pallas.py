"""The DPLR delta rule in kernels (kernels.py)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dplr.kernels import Rows, borders_of, padded, rule, start, unpadded
from kernels_pallas.dplr.xla import INVERSE
from kernels_pallas.gated_delta_rule.blocks import Blocks
from kernels_pallas.gated_delta_rule.gates import is_border


def dplr_pallas(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    g: Float[Array, "B T H K"],
    *,
    scale: float,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the recurrence in kernels; `blocks` overrides the table of blocks.py."""
    options = start(
        q,
        v,
        scale=float(scale),
        chunk_size=chunk_size,
        inverse=INVERSE,
        axis_name=axis_name,
        blocks=blocks,
    )
    if segment_ids is not None:
        # a reads the state before the decay that ends a segment, but a new segment has none yet.
        border = is_border(segment_ids, *borders_of(options, segment_ids))
        a = jnp.where(border[..., None, None], 0, a)
    given, state = padded(options, v, [g, q, k, a, b], initial_state, segment_ids)
    values, g, q, k, a, b = given
    o, state = rule(options, Rows(q, k, values, a, b, g, None, None), state)
    return unpadded(o, state, v, segment_ids, state_dtype)
