"""Grouped-query attention, full ("attn") and over a sliding window ("swa")."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import KVState, WindowState
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import AttentionOptions
from jet_jax.mixers import attend
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.models.linear import linear
from jet_jax.models.norm import RMSNorm
from jet_jax.models.rope import apply_rope
from jet_jax.sharding import constrain


class Attention(nnx.Module):
    """Softmax attention: projections, optional q/k norm, rotary embedding, attention, output.

    With `options.window_size` = w token t sees exactly the w keys t-w+1 … t.
    """

    def __init__(
        self,
        config: ModelConfig,
        options: AttentionOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        self.options = options
        d, width = options.head_dim, config.hidden_size
        make = partial(
            linear,
            dtype=config.dtype,
            param_dtype=param_dtype,
            stddev=config.initializer_range,
            rngs=rngs,
        )
        self.q_proj = make(width, options.num_heads * d, use_bias=options.qkv_bias)
        self.k_proj = make(width, options.num_kv_heads * d, use_bias=options.qkv_bias)
        self.v_proj = make(width, options.num_kv_heads * d, use_bias=options.qkv_bias)
        self.o_proj = make(options.num_heads * d, width, use_bias=options.o_bias)
        if options.qk_norm:
            norm = partial(
                RMSNorm,
                d,
                config.rms_norm_eps,
                offset=config.norm_offset,
                param_dtype=param_dtype,
            )
            self.q_norm, self.k_norm = norm(), norm()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        ctx: Context,
        state: KVState | WindowState | None = None,
    ) -> tuple[Float[Array, "B T D"], KVState | WindowState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        batch, length, _ = x.shape
        q = self.q_proj(x).reshape(batch, length, o.num_heads, o.head_dim)
        k = self.k_proj(x).reshape(batch, length, o.num_kv_heads, o.head_dim)
        v = self.v_proj(x).reshape(batch, length, o.num_kv_heads, o.head_dim)
        if o.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = constrain(apply_rope(q, ctx.positions, o.rope), "bthk")
        k = constrain(apply_rope(k, ctx.positions, o.rope), "btnk")
        if state is None:
            y = attend.causal(
                q, k, v, scale=o.scale, window=o.window_size, segment_ids=ctx.segment_ids
            )
        elif isinstance(state, WindowState):
            y, state = attend.window_step(q, k, v, state, ctx, scale=o.scale)
        else:
            y, state = attend.cache_step(q, k, v, state, ctx, scale=o.scale)
        return self.o_proj(y.reshape(batch, length, -1)), state, ctx.shared
