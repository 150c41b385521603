"""Gated linear attention: a decay for each key channel that the token decides.

With x the layer's (normalised) input:

    q, k, v = q_proj x, k_proj x, v_proj x
    g    = log_sigmoid(gk_proj x) / 16                           one a key channel, low rank
    S_t  = diag(e^g) S_{t-1} + k_t v_tᵀ;   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o) ⊙ silu(g_proj x))

Source: arXiv 2312.06635 §4; flash-linear-attention's layer for names, defaults and variants.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.linear_options import GLAOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.low_rank import LowRank
from jet_jax.mixers.retnet import MultiScaleRetention
from jet_jax.models.linear import formats


class GatedLinearAttention(MultiScaleRetention):
    """The mixer described at the top of this file; projections and output are retention's."""

    def __init__(
        self,
        config: ModelConfig,
        options: GLAOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        super().__init__(config, options, rngs=rngs, param_dtype=param_dtype, place=place)
        self.gk_proj = LowRank(
            config.hidden_size,
            options.gate_low_rank_dim,
            options.widths(config.hidden_size)[1],
            use_bias=True,
            **formats(config, rngs, param_dtype),
        )

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        q, k, v, rows = self._rows(x, ctx, state)
        logits = self._to_all_heads(self.gk_proj(x)).astype(jnp.float32)
        g = jax.nn.log_sigmoid(logits) / o.gate_logit_normalizer
        if o.clamp_min is not None:
            g = jnp.maximum(g, o.clamp_min)
        y, recurrent = self._mix(q, k, v, g, ctx, state)
        if state is not None:
            state = RecurrentState(rows, recurrent)
        return self._output(y, x), state, ctx.shared
