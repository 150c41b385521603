"""Shapes of the gated delta rule to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import gated_delta_rule


def _forward(q, k, v, g, beta, state, segment_ids=None):
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        segment_ids=segment_ids,
        use_qk_l2norm=True,
        implementation="pallas",
    )


def _gradient(q, k, v, g, beta, state, segment_ids=None):
    run = lambda *x: _forward(*x, segment_ids=segment_ids)  # noqa: E731
    outputs, pull = jax.vjp(run, q, k, v, g, beta, state)
    return outputs, pull(outputs)


def _shapes(b, t, h, hv, k, v, dtype=jnp.bfloat16, packed=False):
    """Shapes of q, k, v, g, beta, the initial state and perhaps segment ids."""
    shape = jax.ShapeDtypeStruct
    keys, row = shape((b, t, h, k), dtype), shape((b, t, hv), jnp.float32)
    state = shape((b, hv, k, v), jnp.float32)
    ids = (shape((b, t), jnp.int32),) if packed else ()
    return keys, keys, shape((b, t, hv, v), dtype), row, row, state, *ids


JET_2B, JET_4B = (12, 12, 96, 256), (16, 16, 128, 256)
CASES = [  # a gradient compiles the forward kernels too
    ("gated_delta_rule gradient, 2B", _gradient, _shapes(8, 8192, *JET_2B)),
    ("gated_delta_rule gradient, 4B, packed", _gradient, _shapes(8, 8192, *JET_4B, packed=True)),
    ("gated_delta_rule, 2B, T=262144", _forward, _shapes(1, 262144, *JET_2B)),
    # All 12 heads' states need 17 GB at once, and a v5e has 16: here two devices share the heads.
    ("gated_delta_rule gradient, 2B, T=262144", _gradient, _shapes(1, 262144, 6, 6, 96, 256)),
]
# The widths that the paper searches, float32, and heads that share keys.
WIDTHS = [
    (f"gated_delta_rule gradient, K={k} V={v} {d}", _gradient, _shapes(2, 1024, 2, 4, k, v, d))
    for k, v, d in (
        (64, 144, jnp.dtype("bfloat16")),
        (96, 256, jnp.dtype("float32")),
        (192, 384, jnp.dtype("bfloat16")),  # the linear-attention blocks side by side
        (256, 576, jnp.dtype("bfloat16")),
    )
]
