"""Shapes of linear attention to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import linear_attention, linear_attention_step


def _forward(q, k, v, g, state, segment_ids=None):
    return linear_attention(
        q, k, v, g, initial_state=state, segment_ids=segment_ids, implementation="pallas"
    )


def _gradient(q, k, v, g, state, segment_ids=None):
    run = lambda *x: _forward(*x, segment_ids=segment_ids)  # noqa: E731
    outputs, pull = jax.vjp(run, q, k, v, g, state)
    return outputs, pull(outputs)


def _shapes(b, t, h, hv, k, v, dtype=jnp.bfloat16, *, channels=False, packed=False):
    """Shapes of q, k, v, g, the initial state and perhaps segment ids."""
    shape = jax.ShapeDtypeStruct
    keys, g = shape((b, t, h, k), dtype), (b, t, hv, k) if channels else (b, t, hv)
    ids = (shape((b, t), jnp.int32),) if packed else ()
    values, state = shape((b, t, hv, v), dtype), shape((b, hv, k, v), jnp.float32)
    return keys, keys, values, shape(g, jnp.float32), state, *ids


def _step(q, k, v, g, state):
    return linear_attention_step(q, k, v, g, state, implementation="pallas")


def _step_shapes(b, h, hv, k, v, state_dtype=jnp.float32, *, channels=False):
    """Shapes of q, k, v, g and the state."""
    shape = jax.ShapeDtypeStruct
    keys, values = shape((b, h, k), jnp.bfloat16), shape((b, hv, v), jnp.bfloat16)
    g = shape((b, hv, k) if channels else (b, hv), jnp.float32)
    return keys, keys, values, g, shape((b, hv, k, v), state_dtype)


# The 2B model's layers: retention and gated linear attention; Mamba2 with one group.
FOUR_HEADS, MAMBA2 = (4, 4, 192, 384), (1, 48, 96, 64)
STEPS = [
    ("linear_attention_step, RetNet, B=1", _step, _step_shapes(1, *FOUR_HEADS)),
    (
        "linear_attention_step, GLA, B=128, bfloat16 state",
        _step,
        _step_shapes(128, *FOUR_HEADS, jnp.bfloat16, channels=True),
    ),
    (
        "linear_attention_step, GLA, B=128",
        _step,
        _step_shapes(128, *FOUR_HEADS, channels=True),
    ),
    ("linear_attention_step, Mamba2, B=128", _step, _step_shapes(128, *MAMBA2)),
]
CASES = [  # a gradient compiles the forward kernels too
    ("linear_attention gradient, RetNet", _gradient, _shapes(8, 8192, *FOUR_HEADS)),
    (
        "linear_attention gradient, GLA, packed",
        _gradient,
        _shapes(8, 8192, *FOUR_HEADS, channels=True, packed=True),
    ),
    ("linear_attention gradient, Mamba2", _gradient, _shapes(8, 8192, *MAMBA2)),
    (
        "linear_attention gradient, GLA, T=65536",
        _gradient,
        _shapes(1, 65536, *FOUR_HEADS, channels=True),
    ),
    *STEPS,
]
# Other widths, float32, and heads that share keys.
WIDTHS = [
    (
        f"linear_attention gradient, K={k} V={v} {d}, one decay a {kind}",
        _gradient,
        _shapes(2, 1024, 2, 4, k, v, jnp.dtype(d), channels=kind == "channel"),
    )
    for k, v, d, kind in (
        (64, 144, "bfloat16", "channel"),
        (96, 256, "float32", "head"),
        (96, 128, "float32", "channel"),
        (128, 256, "bfloat16", "channel"),
        (256, 576, "bfloat16", "head"),
    )
]
