"""Puts stored weights on devices, in the dtype and the sharding that the model wants."""

from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jaxtyping import Array

from jet_jax.config import DTYPES, ModelConfig
from jet_jax.copying import contiguous_copy
from jet_jax.models.lm import HybridLM
from jet_jax.params import abstract, flatten, unflatten
from jet_jax.sharding import shardings


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError unless `dtype` is "bfloat16", "float32" or None."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; expected {', '.join(DTYPES)} or None (as stored)")


def with_dtype(config: ModelConfig, dtype: str | None) -> ModelConfig:
    """Returns the config computing in `dtype`; unchanged for None."""
    return config if dtype is None else config.replace(dtype=dtype)


@lru_cache(maxsize=16)
def weight_specs(config: ModelConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Lists a model's weights: shape, and float32 or (for all that may be cast) bfloat16.

    Args:
      config: the model. Its compute dtypes change nothing here, nor do they count in its hash.

    Returns:
      Shape and dtype by dotted path, read-only.
    """
    return MappingProxyType(flatten(abstract(config, jnp.bfloat16)[1]))


def targets(
    config: ModelConfig, stored: Mapping[str, Any], dtype: str | None, mesh: Mesh | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Says what each weight is to become on the devices.

    Args:
      config: the model.
      stored: stored dtype by dotted path.
      dtype: "bfloat16", "float32", or None to keep the stored dtypes.
      mesh: the mesh; None puts everything on the default device.

    Returns:
      Shape, dtype and sharding by dotted path. The vectors that a model always keeps in float32
      (`A_log`, `dt_bias`, Mamba2's `D`) are float32 whatever is stored or asked for.
    """
    specs = dict(weight_specs(config))
    where = dict.fromkeys(specs, _default_sharding()) if mesh is None else shardings(specs, mesh)
    out = {}
    for path, spec in specs.items():
        wanted: Any = dtype or stored[path]
        if spec.dtype == jnp.float32:
            wanted = jnp.float32
        wanted = jax.dtypes.canonicalize_dtype(wanted)  # JAX has no float64 by default
        out[path] = jax.ShapeDtypeStruct(spec.shape, wanted, sharding=where[path])
    return out


def place(view: np.ndarray, target: jax.ShapeDtypeStruct) -> Array:
    """Copies a lazily read array to the devices.

    Args:
      view: the stored array, in our layout; may be a view of a mapped file.
      target: dtype and sharding.

    Returns:
      The array. Each device's part is read and cast alone: a process reads only what its own
      devices hold.
    """
    # A copy in every case: JAX on CPU may adopt numpy's memory, and must not adopt a mapped file.
    return jax.make_array_from_callback(
        target.shape, target.sharding, lambda index: contiguous_copy(view[index], target.dtype)
    )


def build(config: ModelConfig, params: Mapping[str, Array]) -> HybridLM:
    """Returns the model with these weights.

    Args:
      config: the model.
      params: arrays by dotted path.
    """
    graphdef, _ = abstract(config)
    return nnx.merge(graphdef, unflatten(params))


def _default_sharding() -> Sharding:
    device = jax.config.jax_default_device
    return SingleDeviceSharding(
        device if isinstance(device, jax.Device) else jax.local_devices()[0]
    )
