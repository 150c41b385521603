"""Multi-scale retention: linear attention with a fixed decay a head and rotary positions.

With x the layer's (normalised) input:

    q, k, v = rope(q_proj x), rope(k_proj x), v_proj x
    γ_h  = 1 - 2^(-5-h)                                          of head h = 0, 1, …
    S_t  = γ S_{t-1} + k_t v_tᵀ;   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o) ⊙ silu(g_proj x))

Source: arXiv 2307.08621 §2; flash-linear-attention's layer for names, defaults and variants.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.linear_options import RetNetOptions
from jet_jax.mixer_options import RopeOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.projections import ProjectedMixer
from jet_jax.mixers.recurrence import recur
from jet_jax.models.linear import formats, linear
from jet_jax.models.rope import apply_rope
from kernels_pallas import linear_attention, linear_attention_step

ROPE = RopeOptions(theta=10000.0)


class MultiScaleRetention(ProjectedMixer):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: RetNetOptions,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        super().__init__(config, options)
        shared = formats(config, rngs, param_dtype)
        q, k, v, out = options.widths(config.hidden_size)
        self.make_projections(q, k, v, out, rngs, shared)
        gated = options.use_output_gate
        if gated:
            self.g_proj = linear(config.hidden_size, out, **shared)
        # The published code names the norm after how it computes it.
        fused = gated and options.fuse_norm and options.gate_fn == "swish"
        self.norm_name = "g_norm_swish_gate" if fused else "g_norm"
        norm = self.make_norm(options.gate_fn if gated else None, param_dtype)
        setattr(self, self.norm_name, norm)

    def _to_all_heads(self, x: Float[Array, "B T F"]) -> Float[Array, "B T H K"]:
        """Splits a key or value row into heads and repeats each for the query heads it serves."""
        o = self.options
        x = x.reshape(*x.shape[:2], o.kv_heads, -1)
        if o.kv_heads != o.num_heads:
            x = jnp.repeat(x, o.num_heads // o.kv_heads, axis=2)
        return self.heads(x.reshape(*x.shape[:2], -1), o.num_heads)

    def _rows(self, x: Array, ctx: Context, state: RecurrentState | None):
        """The heads of q, k and v, and the raw rows to keep."""
        row = partial(self.row, x=x, ctx=ctx, state=state, without_conv=None)
        (q, q_rows), (k, k_rows), (v, v_rows) = row("q"), row("k"), row("v")
        q, k, v = (
            self.heads(q, self.options.num_heads),
            self._to_all_heads(k),
            self._to_all_heads(v),
        )
        return q, k, v, q_rows | k_rows | v_rows

    def _mix(self, q, k, v, g, ctx: Context, state: RecurrentState | None) -> tuple[Array, Array]:
        """Linear attention with log decays g: [B, T, H] or one for each key channel."""
        return recur(
            linear_attention,
            linear_attention_step,
            {
                "q": (q, "bthk"),
                "k": (k, "bthk"),
                "v": (v, "bthv"),
                "g": (g, "bthk"[: g.ndim]),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
        )

    def _output(self, y: Array, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The output norm, gate and projection."""
        gate = self.g_proj(x) if self.options.use_output_gate else None
        return self.finish(y, gate, getattr(self, self.norm_name))

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        q, k, v, rows = self._rows(x, ctx, state)
        q, k = apply_rope(q, ctx.positions, ROPE), apply_rope(k, ctx.positions, ROPE)
        heads = self.options.num_heads
        decay = np.log1p(-(2.0 ** (-5.0 - np.arange(heads)))).astype(np.float32)
        g = jnp.broadcast_to(decay, (*x.shape[:2], heads))
        y, recurrent = self._mix(q, k, v, g, ctx, state)
        if state is not None:
            state = RecurrentState(rows, recurrent)
        return self._output(y, x), state, ctx.shared
