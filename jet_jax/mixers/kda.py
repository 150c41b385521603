"""Kimi delta attention: the delta rule with a decay for each key channel.

With x the layer's (normalised) input and conv the causal depthwise convolution:

    q, k, v = silu(conv(q_proj x)), silu(conv(k_proj x)), silu(conv(v_proj x))
    β    = sigmoid(b_proj x)                                          one a value head
    g    = -exp(A_log) · softplus(f_proj x + dt_bias)                 one a key channel, low rank
    S_t  = S~ + k_t (β_t (v_t - S~ᵀ k_t))ᵀ  with S~ = diag(e^g) S_{t-1};   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o) ⊙ sigmoid(g_proj x))                     the gate low rank

with q and k l2-normalised per head. Source: arXiv 2510.26692; flash-linear-attention's layer for
names, defaults and variants.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.delta_options import KDAOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.decay import initial_a_log, initial_dt_bias
from jet_jax.mixers.low_rank import LowRank
from jet_jax.mixers.projections import ProjectedMixer
from jet_jax.mixers.recurrence import recur
from jet_jax.models.linear import formats, linear
from kernels_pallas import kda, kda_step


class KimiDeltaAttention(ProjectedMixer):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: KDAOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        super().__init__(config, options)
        shared = formats(config, rngs, param_dtype)
        width = config.hidden_size
        key, value = options.widths()
        heads, key_dim, value_dim = options.state_shape(width)
        self.make_projections(key, key, value, value, rngs, shared)
        self.b_proj = linear(width, heads, **shared)
        # Both bottlenecks are as wide as one head's values.
        self.f_proj = LowRank(width, value_dim, heads * key_dim, **shared)
        self.g_proj = LowRank(width, value_dim, value, use_bias=True, **shared)
        if options.safe_gate:
            self.A_log = nnx.Param(jnp.zeros(heads, jnp.float32))
        else:
            self.A_log = nnx.Param(initial_a_log(rngs, heads, 1.0, 16.0))
        self.dt_bias = nnx.Param(initial_dt_bias(rngs, heads * key_dim))
        self.o_norm = self.make_norm("sigmoid", param_dtype)

    def _decay(self, x: Float[Array, "B T D"]) -> Float[Array, "B T HV K"]:
        """The log decay of each key channel, float32."""
        o = self.options
        f = self.f_proj(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        f = self.heads(f, o.value_heads)
        rate = jnp.exp(self.A_log[...].astype(jnp.float32))[:, None]
        if o.safe_gate:
            return o.lower_bound * jax.nn.sigmoid(rate * f)
        return -rate * jax.nn.softplus(f)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        q, q_rows = self.row("q", x, ctx, state)
        k, k_rows = self.row("k", x, ctx, state)
        v, v_rows = self.row("v", x, ctx, state)
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        if o.allow_neg_eigval:
            beta = 2 * beta
        y, recurrent = recur(
            kda,
            kda_step,
            {
                "q": (self.heads(q, o.num_heads), "bthk"),
                "k": (self.heads(k, o.num_heads), "bthk"),
                "v": (self.heads(v, o.value_heads), "bthv"),
                "g": (self._decay(x), "bthk"),
                "beta": (beta, "bth"),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
            use_qk_l2norm=True,
        )
        y = self.finish(y, self.g_proj(x), self.o_norm)
        if state is not None:
            state = RecurrentState(q_rows | k_rows | v_rows, recurrent)
        return y, state, ctx.shared
