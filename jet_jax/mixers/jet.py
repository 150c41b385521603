"""The JetBlock: a gated delta rule whose values pass a convolution generated token by token.

With x the layer's (normalised) input:

    q, k = silu(q_proj x), silu(k_proj x)        no convolution; l2-normalised per head in the rule
    taps = w2 silu(w1 x) + b2                    [W, H·V] for every token; W-1 is the current token
    v    = silu(sum_j taps_j ⊙ (v_proj x)_{t-(W-1)+j})
    β    = sigmoid(b_proj x);   g = -exp(A_log) · softplus(a_proj x + dt_bias)     one a head
    S_t  = e^g S_{t-1} + k_t (β_t (v_t - (e^g S_{t-1})ᵀ k_t))ᵀ;   o_t = S_tᵀ q_t / sqrt(K)
    y    = o_proj(RMSNorm(o) ⊙ silu(g_proj x))

Source: Jet-Nemotron (arXiv 2508.15884) §3.2 and its released inference code.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import JetState
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import JetOptions
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.decay import initial_a_log, initial_dt_bias
from jet_jax.models.linear import linear, precision
from jet_jax.models.norm import GatedRMSNorm
from jet_jax.sharding import constrain, shard_kernel
from kernels_pallas import dynamic_conv, gated_delta_rule, gated_delta_step


def _conv(u, h, w2, b2, tail, segment_ids):
    """`dynamic_conv` on each device's rows and channels."""

    def run(u, h, w2, b2, tail, segment_ids):
        return dynamic_conv(u, h, w2, b2, tail=tail, segment_ids=segment_ids)

    dims = ("bth", "btd", "dkh", "kh", "bkh", "bt")  # channels are split as heads are
    return shard_kernel(run, dims, ("bth", "bkh"))(u, h, w2, b2, tail, segment_ids)


def _rule(q, k, v, g, beta, state, segment_ids, *, state_dtype):
    """`gated_delta_rule` on each device's rows and heads."""

    def run(q, k, v, g, beta, state, segment_ids):
        return gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            segment_ids=segment_ids,
            use_qk_l2norm=True,
            state_dtype=state_dtype,
        )

    dims = ("bthk", "bthk", "bthv", "bth", "bth", "bhkv", "bt")
    return shard_kernel(run, dims, ("bthv", "bhkv"))(q, k, v, g, beta, state, segment_ids)


def _rule_step(q, k, v, g, beta, state):
    """`gated_delta_step` on each device's rows and heads."""
    run = partial(gated_delta_step, use_qk_l2norm=True)
    dims = ("bhk", "bhk", "bhv", "bh", "bh", "bhkv")
    return shard_kernel(run, dims, ("bhv", "bhkv"))(q, k, v, g, beta, state)


class KernelGenerator(nnx.Module):
    """The two-layer network that makes the convolution's taps.

    `w1` [D, R], `w2` [R, W, H·V] and `b2` [W, H·V], tap-major, so that each tap's channels are
    contiguous. A fresh one starts as the identity (tap W-1 is 1): with `w2` = 0 it still learns,
    through w1 ~ N(0, stddev²); with w1 = w2 = 0 neither would ever get a gradient, and with tiny
    taps the values would vanish.
    """

    def __init__(
        self,
        width: int,
        options: JetOptions,
        *,
        dtype: Any,
        param_dtype: Any,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        hidden, taps = options.generator_width, (options.conv_size, options.value_width)
        init = nnx.initializers.normal(stddev)
        self.w1 = nnx.Param(init(rngs.params(), (width, hidden), param_dtype))
        self.w2 = nnx.Param(jnp.zeros((hidden, *taps), param_dtype))
        self.b2 = nnx.Param(jnp.zeros(taps, param_dtype).at[-1].set(1))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T R"]:
        """The hidden activation that `dynamic_conv` multiplies with `w2`."""
        w1 = self.w1[...].astype(self.dtype)
        return jax.nn.silu(jnp.dot(x, w1, precision=precision(self.dtype)))


class JetBlock(nnx.Module):
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
        self.options = options
        self.state_dtype = config.state_dtype
        width, o = config.hidden_size, options
        formats = {
            "dtype": config.dtype,
            "param_dtype": param_dtype,
            "stddev": config.initializer_range,
            "rngs": rngs,
        }
        make = partial(linear, **formats)
        self.q_proj = make(width, o.key_width)
        self.k_proj = make(width, o.key_width)
        self.v_proj = make(width, o.value_width)
        self.g_proj = make(width, o.value_width)
        self.b_proj = make(width, o.num_heads)
        self.a_proj = make(width, o.num_heads)
        self.o_proj = make(o.value_width, width)
        self.generator = KernelGenerator(width, o, **formats)
        # The published A ~ U(0, 16), kept away from 0 so that its logarithm is finite.
        self.A_log = nnx.Param(initial_a_log(rngs, o.num_heads, 1e-3, 16.0))
        self.dt_bias = nnx.Param(initial_dt_bias(rngs, o.num_heads))
        self.o_norm = GatedRMSNorm(o.value_dim, o.norm_eps, param_dtype=param_dtype)

    def _gates(self, x: Float[Array, "B T D"]) -> tuple[Array, Array]:
        """Log-decay g and writing strength β, float32 [B, T, H]."""
        a = self.a_proj(x).astype(jnp.float32) + self.dt_bias[...].astype(jnp.float32)
        g = -jnp.exp(self.A_log[...].astype(jnp.float32)) * jax.nn.softplus(a)
        return g, jax.nn.sigmoid(self.b_proj(x).astype(jnp.float32))

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: JetState | None = None
    ) -> tuple[Float[Array, "B T D"], JetState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        o = self.options
        batch, length, _ = x.shape
        heads = partial(jnp.reshape, shape=(batch, length, o.num_heads, -1))
        q = constrain(heads(jax.nn.silu(self.q_proj(x))), "bthk")
        k = constrain(heads(jax.nn.silu(self.k_proj(x))), "bthk")
        v, tail = _conv(
            self.v_proj(x),
            self.generator(x),
            self.generator.w2[...].astype(x.dtype),
            self.generator.b2[...].astype(x.dtype),
            None if state is None else state.conv,
            ctx.segment_ids,
        )
        v = constrain(heads(v), "bthv")
        g, beta = self._gates(x)
        if state is not None and length == 1:
            y, recurrent = self._step(q, k, v, g, beta, state, ctx)
        else:
            y, recurrent = _rule(
                q,
                k,
                v,
                g,
                beta,
                None if state is None else state.recurrent,
                ctx.segment_ids,
                state_dtype=self.state_dtype,
            )
        y = self.o_norm(y, heads(self.g_proj(x)))
        y = self.o_proj(y.reshape(batch, length, -1))
        return y, None if state is None else JetState(tail, recurrent), ctx.shared

    def _step(self, q, k, v, g, beta, state: JetState, ctx: Context) -> tuple[Array, Array]:
        """One token a row; a padding token leaves the state as it is (no decay, no writing)."""
        g, beta = g[:, 0], beta[:, 0]
        if ctx.segment_ids is not None:
            real = ctx.segment_ids != 0
            g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)
        y, recurrent = _rule_step(q[:, 0], k[:, 0], v[:, 0], g, beta, state.recurrent)
        return y[:, None], recurrent
