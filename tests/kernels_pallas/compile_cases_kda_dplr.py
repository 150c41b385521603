"""Shapes of kda and dplr_delta_rule to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import dplr_delta_rule, kda


def _kda(q, k, v, g, beta, state):
    return kda(q, k, v, g, beta, initial_state=state, use_qk_l2norm=True, implementation="pallas")


def _dplr(q, k, v, a, b, g, state):
    return dplr_delta_rule(q, k, v, a, b, g, initial_state=state, implementation="pallas")


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


CASES = [  # a gradient compiles the forward kernels too
    ("kda gradient, 18 heads", _gradient(_kda), _shapes("kda", 4, 8192, 18, 18, 128, 128)),
    ("dplr gradient, 8 heads", _gradient(_dplr), _shapes("dplr", 4, 8192, 8, 8, 192, 192)),
]
WIDTHS = [
    ("kda gradient, K=96, shared keys", _gradient(_kda), _shapes("kda", 2, 1024, 2, 4, 96, 144)),
    (
        "dplr gradient, K=64, float32",
        _gradient(_dplr),
        _shapes("dplr", 2, 1024, 2, 2, 64, 64, jnp.dtype("float32")),
    ),
]
