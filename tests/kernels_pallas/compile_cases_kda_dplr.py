"""Shapes of kda and dplr_delta_rule to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import dplr_delta_rule, dplr_delta_rule_step, kda, kda_step


def _kda(q, k, v, g, beta, state):
    return kda(q, k, v, g, beta, initial_state=state, use_qk_l2norm=True, implementation="pallas")


def _dplr(q, k, v, a, b, g, state):
    return dplr_delta_rule(q, k, v, a, b, g, initial_state=state, implementation="pallas")


def _kda_step(q, k, v, g, beta, state):
    return kda_step(q, k, v, g, beta, state, use_qk_l2norm=True, implementation="pallas")


def _dplr_step(q, k, v, a, b, g, state):
    return dplr_delta_rule_step(q, k, v, a, b, g, state, implementation="pallas")


def _gradient(function):
    def run(*inputs):
        outputs, pull = jax.vjp(function, *inputs)
        return outputs, pull(outputs)

    return run


def _shapes(op, b, t, h, hv, k, v, dtype=jnp.bfloat16):
    shape = jax.ShapeDtypeStruct
    keys, values = shape((b, t, h, k), dtype), shape((b, t, hv, v), dtype)
    decay, state = shape((b, t, hv, k), jnp.float32), shape((b, hv, k, v), jnp.float32)
    if op == "kda":
        return keys, keys, values, decay, shape((b, t, hv), jnp.float32), state
    return keys, keys, values, keys, keys, decay, state


def _step_shapes(op, b, h, hv, k, v, state_dtype=jnp.float32):
    *token, state = _shapes(op, b, 1, h, hv, k, v)
    token = [x.update(shape=(x.shape[0], *x.shape[2:])) for x in token]
    return *token, state.update(dtype=state_dtype)


CASES = [  # a gradient compiles the forward kernels too
    ("kda gradient, 18 heads", _gradient(_kda), _shapes("kda", 4, 8192, 18, 18, 128, 128)),
    ("dplr gradient, 8 heads", _gradient(_dplr), _shapes("dplr", 4, 8192, 8, 8, 192, 192)),
    ("kda step, 18 heads, B=128", _kda_step, _step_shapes("kda", 128, 18, 18, 128, 128)),
    ("dplr step, 8 heads, B=128", _dplr_step, _step_shapes("dplr", 128, 8, 8, 192, 192)),
]
WIDTHS = [
    ("kda gradient, T=65536", _gradient(_kda), _shapes("kda", 1, 65536, 18, 18, 128, 128)),
    ("dplr gradient, T=65536", _gradient(_dplr), _shapes("dplr", 1, 65536, 8, 8, 192, 192)),
    ("kda gradient, K=96, shared keys", _gradient(_kda), _shapes("kda", 2, 1024, 2, 4, 96, 144)),
    (
        "dplr gradient, K=64, float32",
        _gradient(_dplr),
        _shapes("dplr", 2, 1024, 2, 2, 64, 64, jnp.dtype("float32")),
    ),
    (
        "kda step, K=96 V=144, shared keys, bfloat16 state",
        _kda_step,
        _step_shapes("kda", 2, 2, 4, 96, 144, jnp.bfloat16),
    ),
    ("dplr step, K=256 V=288", _dplr_step, _step_shapes("dplr", 2, 2, 2, 256, 288)),
]
