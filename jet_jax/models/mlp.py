"""The gated MLP."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.config import ModelConfig
from jet_jax.models.linear import linear

_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """`down(act(gate x) * up x)` without biases. Source: SwiGLU, arXiv 2002.05202."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        width, hidden = config.hidden_size, config.intermediate_size
        make = partial(
            linear,
            dtype=config.dtype,
            param_dtype=param_dtype,
            stddev=config.initializer_range,
            rngs=rngs,
        )
        self.gate_proj = make(width, hidden)
        self.up_proj = make(width, hidden)
        self.down_proj = make(hidden, width)
        self.hidden_act = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to every token."""
        return self.down_proj(_ACTIVATIONS[self.hidden_act](self.gate_proj(x)) * self.up_proj(x))
