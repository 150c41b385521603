"""Gated DeltaNet: the delta rule with one decay a head, short convolutions on q, k and v.

With x the layer's (normalised) input and conv the causal depthwise convolution:

    q, k, v = silu(conv(q_proj x)), silu(conv(k_proj x)), silu(conv(v_proj x))
    β    = sigmoid(b_proj x);   g = -exp(A_log) · softplus(a_proj x + dt_bias)     one a value head
    S_t  = e^g S_{t-1} + k_t (β_t (v_t - (e^g S_{t-1})ᵀ k_t))ᵀ;   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o) ⊙ silu(g_proj x))

with q and k l2-normalised per head. Source: arXiv 2412.06464; flash-linear-attention's layer for
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
from jet_jax.delta_options import GDNOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.decay import initial_a_log, initial_dt_bias
from jet_jax.mixers.projections import ProjectedMixer
from jet_jax.mixers.recurrence import recur
from jet_jax.models.linear import formats, linear
from kernels_pallas import gated_delta_rule, gated_delta_step


class GatedDeltaNet(ProjectedMixer):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: GDNOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        super().__init__(config, options)
        shared = formats(config, rngs, param_dtype)
        key, value = options.widths()
        heads = options.value_heads
        make = partial(linear, config.hidden_size, **shared)
        self.make_projections(key, key, value, value, rngs, shared)
        self.a_proj, self.b_proj = make(heads), make(heads)
        # The published A ~ U(0, 16), kept away from 0 so that its logarithm is finite.
        self.A_log = nnx.Param(initial_a_log(rngs, heads, 1e-3, 16.0))
        self.dt_bias = nnx.Param(initial_dt_bias(rngs, heads))
        if options.use_gate:
            self.g_proj = make(value)
        gate = options.output_gate_activation if options.use_gate else None
        self.o_norm = self.make_norm(gate, param_dtype)

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        q, q_rows = self.row("q", x, ctx, state)
        k, k_rows = self.row("k", x, ctx, state)
        v, v_rows = self.row("v", x, ctx, state)
        dt = self.a_proj(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        g = -jnp.exp(self.A_log[...].astype(jnp.float32)) * jax.nn.softplus(dt)
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        if o.allow_neg_eigval:
            beta = 2 * beta
        y, recurrent = recur(
            gated_delta_rule,
            gated_delta_step,
            {
                "q": (self.heads(q, o.num_heads), "bthk"),
                "k": (self.heads(k, o.num_heads), "bthk"),
                "v": (self.heads(v, o.value_heads), "bthv"),
                "g": (g, "bth"),
                "beta": (beta, "bth"),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
            use_qk_l2norm=True,
        )
        y = self.finish(y, self.g_proj(x) if o.use_gate else None, self.o_norm)
        if state is not None:
            state = RecurrentState(q_rows | k_rows | v_rows, recurrent)
        return y, state, ctx.shared
