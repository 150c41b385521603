"""The JetBlock: a gated delta rule whose values pass a convolution generated token by token.

With x the layer's (normalised) input:

    q, k = silu(q_proj x), silu(k_proj x)        no convolution; l2-normalised per head in the rule
    taps = w2 silu(w1 x) + b2                    [W, H·V] for every token; W-1 is the current token
    v    = silu(sum_j taps_j ⊙ (v_proj x)_{t-(W-1)+j})
    β    = sigmoid(b_proj x);   g = -exp(A_log) · softplus(a_proj x + dt_bias)     one a head
    S_t  = e^g S_{t-1} + k_t (β_t (v_t - (e^g S_{t-1})ᵀ k_t))ᵀ;   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o) ⊙ silu(g_proj x))

Options move the generated convolution to q and k, put learned ones in its place and leave out the
gate. Source: Jet-Nemotron (arXiv 2508.15884) §3.2 and its released inference code.
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
from jet_jax.jet_options import JetOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.decay import initial_a_log, initial_dt_bias
from jet_jax.mixers.dynamic_conv import DynamicConv
from jet_jax.mixers.projections import ProjectedMixer
from jet_jax.mixers.recurrence import recur
from jet_jax.mixers.short_conv import ShortConv
from jet_jax.models.linear import formats, linear
from kernels_pallas import gated_delta_rule, gated_delta_step


class JetBlock(ProjectedMixer):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: JetOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        super().__init__(config, options)
        width, o = config.hidden_size, options
        shared = formats(config, rngs, param_dtype)
        make = partial(linear, width, **shared)
        self.q_proj = make(o.key_width)
        self.k_proj = make(o.key_width)
        self.v_proj = make(o.value_width)
        if o.use_gate:
            self.g_proj = make(o.value_width)
        self.b_proj = make(o.num_heads)
        self.a_proj = make(o.num_heads)
        self.o_proj = linear(o.value_width, width, **shared)
        for row, name in o.generators.items():
            sizes = (width, o.generator_width(row), o.widths[row], o.conv_size)
            setattr(self, name, DynamicConv(*sizes, frozen=o.freeze_generator, **shared))
        for row, name in o.short_convs.items():
            conv = partial(ShortConv, use_bias=False, rngs=rngs, param_dtype=param_dtype)
            setattr(self, name, conv(o.widths[row], o.conv_size))
        # The published A ~ U(0, 16), kept away from 0 so that its logarithm is finite.
        self.A_log = nnx.Param(initial_a_log(rngs, o.num_heads, 1e-3, 16.0))
        self.dt_bias = nnx.Param(initial_dt_bias(rngs, o.num_heads))
        self.o_norm = self.make_norm("silu" if o.use_gate else None, param_dtype)

    def _convolved(
        self, row: str, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None
    ) -> tuple[Float[Array, "B T H K"], dict[str, Array]]:
        """The heads of row "q", "k" or "v", and its last raw values to keep, by name."""
        o = self.options
        u = getattr(self, f"{row}_proj")(x)
        about = {
            "tail": None if state is None else state.rows.get(row),
            "segment_ids": ctx.segment_ids,
        }
        if row in o.generators:
            y, tail = getattr(self, o.generators[row])(u, x, **about)
        elif row in o.short_convs:
            y, tail = getattr(self, o.short_convs[row])(u, **about)
        else:
            return self.heads(jax.nn.silu(u), o.num_heads), {}
        return self.heads(y, o.num_heads), {row: tail}

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        q, q_rows = self._convolved("q", x, ctx, state)
        k, k_rows = self._convolved("k", x, ctx, state)
        v, v_rows = self._convolved("v", x, ctx, state)
        dt = self.a_proj(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        g = -jnp.exp(self.A_log[...].astype(jnp.float32)) * jax.nn.softplus(dt)
        beta = jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))
        y, recurrent = recur(
            gated_delta_rule,
            gated_delta_step,
            {
                "q": (q, "bthk"),
                "k": (k, "bthk"),
                "v": (v, "bthv"),
                "g": (g, "bth"),
                "beta": (beta, "bth"),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
            use_qk_l2norm=True,
        )
        y = self.finish(y, self.g_proj(x) if self.options.use_gate else None, self.o_norm)
        if state is not None:
            state = RecurrentState(q_rows | k_rows | v_rows, recurrent)
        return y, state, ctx.shared
