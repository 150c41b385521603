"""Weights as a pure nested dict, and as a flat dict of dotted paths.

At a jit boundary weights are a nested dict (layer numbers are int keys); on disk they are flat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jet_jax.config import ModelConfig


def flatten(params: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """`{"layers.3.mixer.q_proj.kernel": leaf}` from a nested dict, in the dict's order."""
    out: dict[str, Any] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flatten(value, path + ".")
        else:
            out[path] = value
    return out


def unflatten(flat: Mapping[str, Any]) -> dict[Any, Any]:
    """The inverse of `flatten`. Parts made of digits become ints, so that layer 10 follows 9."""
    out: dict[Any, Any] = {}
    for path, value in flat.items():
        *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
        node = out
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return out


def split(model: nnx.Module) -> tuple[Any, dict[Any, Any]]:
    """The model's static description and its weights as a pure nested dict."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def abstract(config: ModelConfig, param_dtype: Any = jnp.float32) -> tuple[Any, dict[Any, Any]]:
    """As `split`, without memory: the weights are ShapeDtypeStructs of a model of that config."""
    from jet_jax.models.lm import HybridLM

    model = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0), param_dtype=param_dtype))
    graphdef, params = split(model)
    return graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def digest(params: Any) -> str:
    """16 hex digits that tell weights apart: a hash of a tree's arrays, in its order."""
    total = hashlib.sha256()
    for x in jax.tree.leaves(params):
        total.update(np.asarray(jax.device_get(x)).tobytes())
    return total.hexdigest()[:16]
