"""What most recurrent mixers do before and after their recurrence: rows q, k, v and the output."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.mixers.context import Context
from jet_jax.mixers.short_conv import ShortConv
from jet_jax.models.linear import linear
from jet_jax.models.norm import GatedRMSNorm, RMSNorm
from jet_jax.sharding import constrain

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "swish": jax.nn.silu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=True),
}


class ProjectedMixer(nnx.Module):
    """Base of the mixers with projections q, k, v, short convolutions on them and one output."""

    def __init__(self, config: ModelConfig, options: Any):
        self.options = options
        self.hidden_size = config.hidden_size
        self.dtype = config.dtype
        self.state_dtype = config.state_dtype

    def make_projections(
        self, q: int, k: int, v: int, out: int, rngs: nnx.Rngs, formats: dict[str, Any]
    ) -> None:
        """Makes q_proj, k_proj, v_proj and o_proj for rows of these widths, and the convolutions.

        Args:
          q: width of the query row.
          k: width of the key row.
          v: width of the value row.
          out: width of the heads' outputs side by side.
          rngs: random numbers.
          formats: from `jet_jax.models.linear.formats`.
        """
        o = self.options
        make = partial(linear, self.hidden_size, **formats)
        self.q_proj, self.k_proj, self.v_proj = make(q), make(k), make(v)
        self.o_proj = linear(out, self.hidden_size, **formats)
        if o.use_short_conv:
            conv = partial(
                ShortConv,
                taps=o.conv_size,
                use_bias=o.conv_bias,
                rngs=rngs,
                param_dtype=formats["param_dtype"],
            )
            self.q_conv1d, self.k_conv1d, self.v_conv1d = conv(q), conv(k), conv(v)

    def make_norm(self, gate: str | None, param_dtype: Any) -> RMSNorm:
        """The norm over a head's values, with the output gate of that activation inside or none."""
        width, eps = self.options.state_shape(self.hidden_size)[2], self.options.norm_eps
        if gate is None:
            return RMSNorm(width, eps, param_dtype=param_dtype)
        return GatedRMSNorm(width, eps, activation=ACTIVATIONS[gate], param_dtype=param_dtype)

    def row(
        self,
        name: str,
        x: Float[Array, "B T D"],
        ctx: Context,
        state: RecurrentState | None,
        *,
        activation: str | None = "silu",
        without_conv: str | None = "silu",
    ) -> tuple[Float[Array, "B T F"], dict[str, Array]]:
        """Projects x to row `name` ("q", "k" or "v") and convolves it.

        Args:
          name: which row.
          x: the layer's input.
          ctx: the call's context.
          state: holds the rows before the call.
          activation: what follows the convolution, "silu" or None.
          without_conv: what follows the projection where the options have no convolution.

        Returns:
          The row, and the raw rows to keep by name, empty without a convolution.
        """
        u = getattr(self, f"{name}_proj")(x)
        if not self.options.use_short_conv:
            return jax.nn.silu(u) if without_conv == "silu" else u, {}
        conv = getattr(self, f"{name}_conv1d")
        tail = None if state is None else state.rows[name]
        y, tail = conv(u, activation=activation, tail=tail, segment_ids=ctx.segment_ids)
        return y, {name: tail}

    def heads(self, x: Float[Array, "B T F"], count: int) -> Float[Array, "B T H K"]:
        """Splits a row into heads, which a mesh may hold on several devices."""
        return constrain(x.reshape(*x.shape[:2], count, -1), "bthk")

    def finish(
        self, y: Float[Array, "B T H V"], gate: Float[Array, "B T F"] | None, norm: RMSNorm
    ) -> Float[Array, "B T D"]:
        """Normalises and gates the heads' outputs and projects them to the model's width."""
        if gate is None:
            y = norm(y).astype(jnp.dtype(self.dtype))
        else:
            assert isinstance(norm, GatedRMSNorm)
            y = norm(y, gate.reshape(y.shape))
        return self.o_proj(y.reshape(*y.shape[:2], -1))
