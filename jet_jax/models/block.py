"""One decoder layer: a mixer and an MLP, each on the residual stream."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.config import ModelConfig
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.models.mlp import MLP
from jet_jax.models.norm import RMSNorm
from jet_jax.sharding import constrain


class Block(nnx.Module):
    """`x + mixer(norm(x))`, then `x + mlp(norm(x))`.

    With `config.use_post_norms` (Gemma) both branches are normalised again before they are added.
    """

    def __init__(
        self,
        config: ModelConfig,
        kind: str,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        norm = partial(
            RMSNorm,
            config.hidden_size,
            config.rms_norm_eps,
            offset=config.norm_offset,
            param_dtype=param_dtype,
        )
        self.use_post_norms = config.use_post_norms
        self.input_layernorm = norm()
        self.mixer = MIXERS[kind](
            config, config.options(kind), rngs=rngs, param_dtype=param_dtype, place=place
        )
        self.post_attention_layernorm = norm()
        if self.use_post_norms:
            self.pre_feedforward_layernorm = norm()
            self.post_feedforward_layernorm = norm()
        self.mlp = MLP(config, rngs=rngs, param_dtype=param_dtype)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: Any = None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"], Any, dict[str, Any]]:
        """Returns the new residual stream, the mixer's output, the new state and `shared`."""
        with jax.named_scope("mixer"):
            mixed, state, shared = self.mixer(self.input_layernorm(x), ctx, state)
        if self.use_post_norms:
            x = x + self.post_attention_layernorm(mixed)
            with jax.named_scope("mlp"):
                y = self.mlp(self.pre_feedforward_layernorm(x))
            x = x + self.post_feedforward_layernorm(y)
        else:
            x = x + mixed
            with jax.named_scope("mlp"):
                x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, "btd"), mixed, state, shared
