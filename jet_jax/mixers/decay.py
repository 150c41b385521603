"""The two vectors that make decays in Mamba2, Gated DeltaNet, KDA and the JetBlock.

    g = -exp(A_log) · softplus(dt + dt_bias)

Always float32, whatever the model's dtype: they sit inside two exponentials.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def initial_a_log(rngs: nnx.Rngs, size: int, low: float, high: float) -> jax.Array:
    """log A with A ~ U(low, high), in float32; `low` must be positive to keep it finite."""
    a = jax.random.uniform(rngs.params(), (size,), minval=low, maxval=high)
    return jnp.log(a)


def initial_dt_bias(rngs: nnx.Rngs, size: int) -> jax.Array:
    """The inverse softplus of step sizes log-uniform in [0.001, 0.1], in float32."""
    log_dt = jax.random.uniform(rngs.params(), (size,), minval=jnp.log(1e-3), maxval=jnp.log(0.1))
    dt = jnp.maximum(jnp.exp(log_dt), 1e-4)
    return dt + jnp.log(-jnp.expm1(-dt))
