"""Shapes of the decoding step to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import gated_delta_step


def _step(q, k, v, g, beta, state):
    return gated_delta_step(q, k, v, g, beta, state, use_qk_l2norm=True, implementation="pallas")


def step_shapes(b, h, hv, k, v, state_dtype=jnp.float32, dtype=jnp.bfloat16):
    """Shapes of q, k, v, g, beta and the state."""
    shape = jax.ShapeDtypeStruct
    keys, row = shape((b, h, k), dtype), shape((b, hv), jnp.float32)
    return keys, keys, shape((b, hv, v), dtype), row, row, shape((b, hv, k, v), state_dtype)


JET_2B, JET_4B = (12, 12, 96, 256), (16, 16, 128, 256)
CASES = [
    ("gated_delta_step, 2B, B=1", _step, step_shapes(1, *JET_2B)),
    ("gated_delta_step, 2B, B=8, bfloat16 state", _step, step_shapes(8, *JET_2B, jnp.bfloat16)),
    ("gated_delta_step, 2B, B=128", _step, step_shapes(128, *JET_2B)),
    ("gated_delta_step, 4B, B=128", _step, step_shapes(128, *JET_4B)),
    ("gated_delta_step, 4B, B=128, bfloat16 state", _step, step_shapes(128, *JET_4B, jnp.bfloat16)),
]
# The paper's widths, and heads that share keys.
WIDTHS = [
    (f"gated_delta_step, K={k} V={v} {jnp.dtype(state)} state", _step, shapes)
    for k, v, state in (
        (64, 144, jnp.bfloat16),
        (96, 288, jnp.float32),
        (192, 384, jnp.bfloat16),
        (256, 576, jnp.float32),
    )
    for shapes in [step_shapes(2, 4, 8, k, v, state)]
]
