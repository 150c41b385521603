"""Linear layers with the project's number formats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def precision(dtype: Any) -> jax.lax.Precision | None:
    """Matmul precision for a compute dtype: float32 means float32, not a GPU's default TF32."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def linear(
    inputs: int,
    outputs: int,
    *,
    dtype: Any,
    param_dtype: Any,
    stddev: float,
    rngs: nnx.Rngs,
    use_bias: bool = False,
) -> nnx.Linear:
    """A linear layer: kernel [inputs, outputs] ~ N(0, stddev²), bias 0, computing in `dtype`."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision(dtype),
        kernel_init=nnx.initializers.normal(stddev),
        rngs=rngs,
    )
