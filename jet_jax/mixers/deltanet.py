"""DeltaNet: the delta rule without decay, short convolutions on q, k and v.

With x the layer's (normalised) input and conv the causal depthwise convolution:

    q, k, v = silu(conv(q_proj x)), silu(conv(k_proj x)), silu(conv(v_proj x))
    β    = sigmoid(b_proj x)                                                       one a head
    S_t  = S_{t-1} + k_t (β_t (v_t - S_{t-1}ᵀ k_t))ᵀ;   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o))

with q and k l2-normalised per head. Source: arXiv 2406.06484; flash-linear-attention's layer for
names, defaults and variants.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.delta_options import DeltaNetOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.projections import ProjectedMixer
from jet_jax.mixers.recurrence import recur
from jet_jax.models.linear import formats, linear
from kernels_pallas import gated_delta_rule, gated_delta_step


def sum_normalise(x: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """Divides by the sum of absolute values, at least 1e-6, in float32."""
    y = x.astype(jnp.float32)
    total = jnp.sum(jnp.abs(y), axis=-1, keepdims=True)
    return (y / jnp.maximum(total, 1e-6)).astype(x.dtype)


class DeltaNet(ProjectedMixer):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: DeltaNetOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        super().__init__(config, options)
        shared = formats(config, rngs, param_dtype)
        key, value = options.widths(config.hidden_size)
        make = partial(linear, config.hidden_size, **shared)
        self.make_projections(key, key, value, value, rngs, shared)
        if options.use_beta:
            self.b_proj = make(options.num_heads)
        if options.use_gate:
            self.g_proj = make(value)
        self.o_norm = self.make_norm("swish" if options.use_gate else None, param_dtype)

    def _query_or_key(self, name: str, x: Array, ctx: Context, state: RecurrentState | None):
        """The heads of q or k, with their activation and, if by sum, their norm."""
        o = self.options
        inside = "silu" if o.qk_activation == "silu" else None
        y, rows = self.row(name, x, ctx, state, activation=inside, without_conv=inside)
        if o.qk_activation == "relu":
            y = jax.nn.relu(y)
        elif o.qk_activation == "elu":
            y = jax.nn.elu(y) + 1
        y = self.heads(y, o.num_heads)
        return sum_normalise(y) if o.qk_norm == "sum" else y, rows

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        q, q_rows = self._query_or_key("q", x, ctx, state)
        k, k_rows = self._query_or_key("k", x, ctx, state)
        v, v_rows = self.row("v", x, ctx, state)
        beta = jnp.ones((*x.shape[:2], o.num_heads), jnp.float32)
        if o.use_beta:
            beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        if o.allow_neg_eigval:
            beta = 2 * beta
        y, recurrent = recur(
            gated_delta_rule,
            gated_delta_step,
            {
                "q": (q, "bthk"),
                "k": (k, "bthk"),
                "v": (self.heads(v, o.num_heads), "bthv"),
                "g": (None, "bth"),
                "beta": (beta, "bth"),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
            use_qk_l2norm=o.qk_norm == "l2",
        )
        y = self.finish(y, self.g_proj(x) if o.use_gate else None, self.o_norm)
        if state is not None:
            state = RecurrentState(q_rows | k_rows | v_rows, recurrent)
        return y, state, ctx.shared
