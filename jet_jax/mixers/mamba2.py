"""Mamba2: a state space of one decay a head, with B, C and values from one convolution.

With x the layer's (normalised) input and conv the causal depthwise convolution:

    z, u, B, C, δ = in_proj x;   u, B, C = silu(conv(u, B, C))
    δ    = softplus(δ + dt_bias);   g = -exp(A_log) · δ                        one a head
    S_t  = e^g S_{t-1} + B_t (δ_t u_t)ᵀ;   o_t = S_tᵀ C_t + D u_t              no scale
    y    = out_proj(RMSNorm(o ⊙ silu(z)))                                      gate, then norm

B and C are shared by the heads of a group. Source: arXiv 2405.21060 §7; names and defaults of
flash-linear-attention's layer, groups as in mamba_ssm (consecutive heads share one).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.linear_options import Mamba2Options
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.decay import initial_a_log, initial_dt_bias
from jet_jax.mixers.recurrence import recur
from jet_jax.mixers.short_conv import ShortConv, convolve
from jet_jax.models.linear import formats, linear, split_linear
from jet_jax.models.norm import normalise
from jet_jax.sharding import constrain
from kernels_pallas import linear_attention, linear_attention_step


class GateNorm(nnx.Module):
    """Norm over each group's channels, after (or before) the gate: float32."""

    def __init__(self, width: int, options: Mamba2Options, param_dtype: Any):
        self.eps, self.groups = options.norm_eps, options.n_groups
        self.norm_before_gate = options.norm_before_gate
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "B T I"], z: Float[Array, "B T I"]) -> Float[Array, "B T I"]:
        """Gates x by silu(z) and normalises it."""
        gate = jax.nn.silu(z.astype(jnp.float32))
        y = x.astype(jnp.float32) if self.norm_before_gate else x.astype(jnp.float32) * gate
        groups = y.reshape(*y.shape[:2], self.groups, -1)
        y = normalise(groups, self.eps).reshape(y.shape) * self.scale[...].astype(jnp.float32)
        return y * gate if self.norm_before_gate else y


class Mamba2(nnx.Module):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: Mamba2Options,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        del place  # all layers are alike
        self.options, self.dtype, self.state_dtype = options, config.dtype, config.state_dtype
        shared = formats(config, rngs, param_dtype)
        width = config.hidden_size
        self.widths = options.projected(width)
        inner, _, bc, heads = self.widths
        self.in_proj = linear(width, sum(self.widths), use_bias=options.use_bias, **shared)
        self.conv1d = ShortConv(
            inner + bc,
            options.conv_kernel,
            use_bias=options.use_conv_bias,
            rngs=rngs,
            param_dtype=param_dtype,
        )
        self.A_log = nnx.Param(initial_a_log(rngs, heads, *options.A_init_range))
        self.dt_bias = nnx.Param(initial_dt_bias(rngs, heads))
        # Float32 like the two above, as published.
        self.D = nnx.Param(jnp.ones(inner if options.D_has_hdim else heads, jnp.float32))
        if options.rmsnorm:
            self.norm = GateNorm(inner, options, param_dtype)
        # Uniform within ±1/sqrt(fan-in), less the deeper the model: every layer adds to one stream.
        init = nnx.initializers.variance_scaling(1 / (3 * config.num_layers), "fan_in", "uniform")
        self.out_proj = linear(inner, width, use_bias=options.use_bias, kernel_init=init, **shared)

    def _convolve(self, x: Array, bc: Array, ctx: Context, state: RecurrentState | None):
        """The convolution, of the channels, which a mesh may split, and of B and C, which it keeps.

        Returns both parts and the raw rows to keep.
        """
        inner = x.shape[-1]
        taps, bias = self.conv1d.taps[...], None
        out, rows = [], {}
        for name, u, here, dims in (
            ("x", x, slice(None, inner), "h"),
            ("bc", bc, slice(inner, None), "d"),
        ):
            if self.conv1d.bias is not None:
                bias = self.conv1d.bias[here]
            y, rows[name] = convolve(
                u,
                taps[:, here],
                bias,
                "silu",
                tail=None if state is None else state.rows[name],
                segment_ids=ctx.segment_ids,
                dims=dims,
            )
            out.append(y)
        return *out, rows

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        batch, length, _ = x.shape
        inner, _, _, heads = self.widths
        z, u, bc, dt = split_linear(self.in_proj, x, self.widths, ("bth", "bth", "btd", "bth"))
        u, bc, rows = self._convolve(u, bc, ctx, state)
        u = constrain(u.reshape(batch, length, heads, -1), "bthv")
        bc = bc.reshape(batch, length, 2 * o.n_groups, o.state_size)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32))
        dt = jnp.clip(dt, *o.dt_limit)
        values = u.astype(jnp.float32)
        # One group serves the heads of every device; several are split as the heads are.
        groups = "btsk" if o.n_groups == 1 else "bthk"
        y, recurrent = recur(
            linear_attention,
            linear_attention_step,
            {
                "q": (bc[:, :, o.n_groups :], groups),
                "k": (bc[:, :, : o.n_groups], groups),
                "v": ((dt[..., None] * values).astype(u.dtype), "bthv"),
                "g": (-jnp.exp(self.A_log[...].astype(jnp.float32)) * dt, "bth"),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
            scale=1.0,
        )
        skip = self.D[...].astype(jnp.float32).reshape(heads, -1)
        y = (y.astype(jnp.float32) + skip * values).reshape(batch, length, inner)
        if o.rmsnorm:
            y = self.norm(y, z)
        else:
            y = y * jax.nn.silu(z.astype(jnp.float32))
        if state is not None:
            state = RecurrentState(rows, recurrent)
        return self.out_proj(y.astype(self.dtype)), state, ctx.shared
