"""The DPLR delta rule in kernels (kernels.py)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dplr.kernels import Options, Rows, padded, rule, start, unpadded
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
    blocks = start(q, v, chunk_size, axis_name, blocks)
    if segment_ids is not None:
        # a reads the state before the decay that ends a segment, but a new segment has none yet.
        a = jnp.where(is_border(segment_ids)[..., None, None], 0, a)
    others = [g, q, k, a, b]
    given, state = padded(v, others, initial_state, segment_ids, q.shape[-1], blocks)
    values, g, q, k, a, b = given
    rows = Rows(q, k, values, a, b, g, None, None)
    o, state = rule(Options(float(scale), blocks, INVERSE), rows, state)
    return unpadded(o, state, v, segment_ids, state_dtype)
