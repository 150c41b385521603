"""Linear layers with the project's number formats."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.config import ModelConfig
from jet_jax.sharding import constrain, tensor_shards


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
    kernel_init: nnx.Initializer | None = None,
) -> nnx.Linear:
    """A linear layer computing in `dtype`: bias 0 and kernel [inputs, outputs] ~ N(0, stddev²).

    `kernel_init` replaces the normal distribution.
    """
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        precision=precision(dtype),
        kernel_init=kernel_init or nnx.initializers.normal(stddev),
        rngs=rngs,
    )


def formats(config: ModelConfig, rngs: nnx.Rngs, param_dtype: Any) -> dict[str, Any]:
    """What all linear layers of a model share, as keyword arguments of `linear`."""
    return {
        "dtype": config.dtype,
        "param_dtype": param_dtype,
        "stddev": config.initializer_range,
        "rngs": rngs,
    }


def split_linear(
    layer: nnx.Linear, x: Float[Array, "*B D"], widths: tuple[int, ...], dims: tuple[str, ...]
) -> list[Float[Array, "*B F"]]:
    """Applies a linear layer whose output is several rows side by side, and takes them apart.

    On a mesh with a tensor axis each part is multiplied alone and pinned: slices of one product
    that is split over devices would not lie on the borders between the devices.

    Args:
      layer: outputs `sum(widths)` features.
      x: its input.
      widths: width of each part, in order.
      dims: for each part the letters of `sharding.constrain`.

    Returns:
      The parts, in the layer's compute dtype.
    """
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    if tensor_shards() == 1:
        return jnp.split(layer(x), ends[:-1], axis=-1)
    kernel = layer.kernel[...].astype(layer.dtype)
    bias = None if layer.bias is None else layer.bias[...].astype(layer.dtype)
    out = []
    for width, end, letters in zip(widths, ends, dims, strict=True):
        here = slice(end - width, end)
        y = jnp.dot(x.astype(layer.dtype), kernel[:, here], precision=layer.precision)
        out.append(constrain(y if bias is None else y + bias[here], letters))
    return out
