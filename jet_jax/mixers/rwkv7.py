"""The time mixing of RWKV-7: a delta rule whose removal key is not its writing key.

With x the layer's (normalised) input, x' the input of the token before and μ a weight of each use:

    x^c  = x + μ_c ⊙ (x' - x)                       of the uses c = r, w, k, v, a, g
    r, k, v = r_proj x^r, k_proj x^k, v_proj x^v
    g    = -e^(-1/2) · sigmoid(w_lora x^w)          log decay of each key channel
    a    = sigmoid(a_lora x^a);   gate = g_lora x^g
    v   += (v_first - v) ⊙ sigmoid(v_lora x^v)      but in the first layer, whose v is v_first
    κ    = normalise(k ⊙ k_k);   k = k ⊙ (1 + (a - 1) ⊙ k_a)
    S_t  = diag(e^g) S_{t-1} - (κ ⊙ a)(κᵀ S_{t-1}) + k vᵀ;   o_t = S_tᵀ r_t
    y    = o_proj((GroupNorm(o) + (Σ r k r_k) v) ⊙ gate)

Source: arXiv 2503.14456; flash-linear-attention's layer for names, defaults and initialisation. The
first RWKV-7 layer of a hybrid hands its values on as `shared["v_first"]`, wherever it stands.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.mixers.context import FIRST_LAYER, Context, Place
from jet_jax.mixers.low_rank import LowRank
from jet_jax.mixers.recurrence import recur
from jet_jax.mixers.short_conv import convolve
from jet_jax.models.linear import formats, linear
from jet_jax.models.norm import GroupNorm
from jet_jax.rwkv7_options import RWKV7Options
from jet_jax.sharding import constrain
from kernels_pallas import dplr_delta_rule, dplr_delta_rule_step

ZEROS = nnx.initializers.zeros_init()
# Exponents of the token shifts' start: how fast the share of the token before falls with the depth.
SHIFTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
ACTIVATIONS = {"w": jnp.tanh, "a": None, "v": None, "g": jax.nn.sigmoid}
RANKS = {"w": "decay", "a": "a", "v": "v", "g": "gate"}


class RWKV7(nnx.Module):
    """The mixer described at the top of this file."""

    def __init__(
        self,
        config: ModelConfig,
        options: RWKV7Options,
        *,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
        place: Place = FIRST_LAYER,
    ):
        self.options, self.dtype, self.state_dtype = options, config.dtype, config.state_dtype
        self.is_first = place.first
        shared = formats(config, rngs, param_dtype)
        width = config.hidden_size
        heads, key, _ = options.state_shape(width)
        values = options.value_width(width)
        self.num_heads = heads
        start = _Start(width, key, place.index, config.num_layers)

        def vector(value: Array) -> nnx.Param:
            return nnx.Param(jnp.broadcast_to(value, (width,)).astype(param_dtype))

        for use, exponent in SHIFTS.items():
            setattr(self, f"x_{use}", nnx.Param(start.shift(exponent).astype(param_dtype)))
        self.k_k, self.k_a = vector(0.71 - 0.1 * start.slope), vector(jnp.array(1.02))
        self.r_k = nnx.Param(jnp.full((heads, key), -0.04, param_dtype))
        self.r_proj = linear(width, width, kernel_init=_orthogonal(), **shared)
        self.k_proj = linear(width, width, kernel_init=_orthogonal(0.1), **shared)
        self.v_proj = linear(width, values, kernel_init=_orthogonal(), **shared)
        self.o_proj = linear(values, width, kernel_init=ZEROS, **shared)

        def lora(use: str, out: int) -> LowRank:
            rank = options.rank(RANKS[use], width)
            made = LowRank(
                width,
                rank,
                out,
                use_bias=use != "g",
                activation=ACTIVATIONS[use],
                down_init=ZEROS,
                up_init=_orthogonal(0.1 * math.sqrt(max(1.0, rank / out))),
                **shared,
            )
            if made.up.bias is not None:
                made.up.bias[...] = start.bias(use, out).astype(param_dtype)
            return made

        self.w_lora, self.a_lora = lora("w", width), lora("a", width)
        self.g_lora = lora("g", values)
        if not place.first:
            self.v_lora = lora("v", values)
        self.g_norm = GroupNorm(
            values, key * options.norm_eps, scale=start.norm_scale(), param_dtype=param_dtype
        )

    def _before(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None
    ) -> tuple[Float[Array, "B T D"], Array]:
        """Each token's predecessor in its segment, zeros at the start, and the row to keep."""
        taps = jnp.array([[1.0], [0.0]], x.dtype)  # a convolution that looks back, and nothing else
        return convolve(
            x,
            jnp.broadcast_to(taps, (2, x.shape[-1])),
            None,
            None,
            tail=None if state is None else state.rows["shift"],
            segment_ids=ctx.segment_ids,
            dims="d",
        )

    def _values(
        self, mixed: Float[Array, "B T D"], ctx: Context
    ) -> tuple[Float[Array, "B T F"], dict[str, Any]]:
        """The values, pulled towards those of the first layer, and the new `shared`."""
        v = self.v_proj(mixed)
        if self.is_first:
            return v, {**ctx.shared, "v_first": v}
        if "v_first" not in ctx.shared:
            raise ValueError(
                "rwkv7: this layer mixes in the values of the model's first rwkv7 layer, but "
                "ctx.shared has no 'v_first'; run that layer before, or build this one with "
                "Place(first=True)"
            )
        share = jax.nn.sigmoid(self.v_lora(mixed).astype(jnp.float32))
        here, there = v.astype(jnp.float32), ctx.shared["v_first"].astype(jnp.float32)
        return (here + (there - here) * share).astype(v.dtype), ctx.shared

    def _removal_key(self, k: Float[Array, "B T H K"]) -> Float[Array, "B T H K"]:
        """κ: the key, weighted by channel and of length 1; float32."""
        weights = self.k_k[...].astype(jnp.float32).reshape(k.shape[2:])
        y = k.astype(jnp.float32) * weights
        squares = jnp.sum(y * y, axis=-1, keepdims=True)
        if self.options.fuse_norm:
            return y * jax.lax.rsqrt(squares + 1e-6)
        # The square of the published lower bound 1e-12 on the length.
        return y * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))

    def __call__(
        self, x: Float[Array, "B T D"], ctx: Context, state: RecurrentState | None = None
    ) -> tuple[Float[Array, "B T D"], RecurrentState | None, dict[str, Any]]:
        """Mixes along time; see `jet_jax.mixers` for the contract."""
        before, last = self._before(x, ctx, state)
        here, step = x.astype(jnp.float32), (before.astype(jnp.float32) - x.astype(jnp.float32))

        def mixed(use: str) -> Array:
            weight = getattr(self, f"x_{use}")[...].astype(jnp.float32)
            return (here + step * weight).astype(x.dtype)

        def heads(row: Array) -> Array:
            return constrain(row.reshape(*row.shape[:2], self.num_heads, -1), "bthk")

        r, k = heads(self.r_proj(mixed("r"))), heads(self.k_proj(mixed("k")))
        decay = jax.nn.sigmoid(heads(self.w_lora(mixed("w"))).astype(jnp.float32))
        a = jax.nn.sigmoid(heads(self.a_lora(mixed("a"))).astype(jnp.float32))
        gate = self.g_lora(mixed("g"))
        v, shared = self._values(mixed("v"), ctx)
        v = heads(v)
        kappa = self._removal_key(k)
        k_a = self.k_a[...].astype(jnp.float32).reshape(k.shape[2:])
        k = (k.astype(jnp.float32) * (1 + (a - 1) * k_a)).astype(x.dtype)
        o, recurrent = recur(
            dplr_delta_rule,
            dplr_delta_rule_step,
            {
                "q": (r, "bthk"),
                "k": (k, "bthk"),
                "v": (v, "bthv"),
                "a": ((-kappa).astype(x.dtype), "bthk"),
                "b": ((kappa * a).astype(x.dtype), "bthk"),
                "g": (-math.exp(-0.5) * decay, "bthk"),
            },
            None if state is None else state.recurrent,
            ctx,
            state_dtype=self.state_dtype,
        )
        r_k = self.r_k[...].astype(jnp.float32)
        bonus = jnp.sum(r.astype(jnp.float32) * k.astype(jnp.float32) * r_k, -1, keepdims=True)
        y = self.g_norm(o) + (bonus * v.astype(jnp.float32)).reshape(*x.shape[:2], -1)
        y = self.o_proj((y * gate.astype(jnp.float32)).astype(x.dtype))
        if state is not None:
            state = RecurrentState({"shift": last}, recurrent)
        return y, state, shared


def _orthogonal(gain: float = 1.0) -> nnx.Initializer:
    """Orthonormal rows or columns times `gain`, found in float32 whatever the weights' dtype."""
    init = nnx.initializers.orthogonal(gain)

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return init(key, shape, jnp.float32).astype(dtype)

    return draw


class _Start:
    """The published start of a layer's vectors, which depends on its place.

    Args:
      width: the model's width D.
      key: a head's key width.
      index: the layer's number; may be traced.
      layers: the model's number of layers.
    """

    def __init__(self, width: int, key: int, index: Any, layers: int):
        self.width, self.layers = width, layers
        self.index = jnp.asarray(index, jnp.float32)
        self.depth = self.index / max(layers - 1, 1)  # 0 to 1
        channel = jnp.arange(width, dtype=jnp.float32)
        self.share = channel / width
        self.ramp = channel / max(width - 1, 1)  # 0 to 1
        self.slope = self.ramp - 0.5
        within = (jnp.arange(width) % key - (key - 1) / 2) / max((key - 1) / 2, 0.5)
        self.zigzag = within * jnp.abs(within)  # -1 to 1 within each head

    def shift(self, exponent: float) -> Float[Array, "1 1 D"]:
        """The weights of the token before: 1 for the first channel, falling."""
        power = exponent * (1 - self.index / self.layers)
        return (1 - self.share**power)[None, None]

    def bias(self, use: str, out: int) -> Float[Array, " F"]:
        """The bias of decay ("w"), learning rate ("a") or value residual ("v")."""
        if use == "w":
            decay = -6 + 6 * self.ramp ** (1 + self.depth**0.3)
            return decay + 0.5 + 2.5 * self.zigzag
        if use == "a":
            return -0.19 + 0.3 * self.zigzag + 0.4 * self.slope
        ramp = jnp.arange(out, dtype=jnp.float32) / max(out - 1, 1)
        return 0.73 - 0.4 * (ramp - 0.5)

    def norm_scale(self) -> Float[Array, ""]:
        """The output norm's scale, which grows with the depth."""
        return ((self.index + 1) / self.layers) ** 0.7
