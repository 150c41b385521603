"""The convolution whose taps a small network generates for every token, as a layer with weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jet_jax.models.linear import precision
from jet_jax.sharding import shard_kernel
from kernels_pallas import dynamic_conv


class DynamicConv(nnx.Module):
    """Causal depthwise convolution with taps w2 silu(w1 x) + b2, then SiLU.

    `w1` [D, R], `w2` [R, W, C] and `b2` [W, C], tap-major, so that each tap's channels are
    contiguous. A fresh one starts as the identity (tap W-1 is 1): with `w2` = 0 it still learns,
    through w1 ~ N(0, stddev²); with w1 = w2 = 0 neither would ever get a gradient, and with tiny
    taps the values would vanish. A frozen one keeps w1 and w2 ~ N(0, stddev²) for ever.

    Source: Jet-Nemotron (arXiv 2508.15884) §2.4.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        channels: int,
        taps: int,
        *,
        frozen: bool = False,
        dtype: Any,
        param_dtype: Any,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(stddev)
        self.w1 = nnx.Param(init(rngs.params(), (width, hidden), param_dtype))
        w2 = (hidden, taps, channels)
        self.w2 = nnx.Param(
            init(rngs.params(), w2, param_dtype) if frozen else jnp.zeros(w2, param_dtype)
        )
        self.b2 = nnx.Param(jnp.zeros((taps, channels), param_dtype).at[-1].set(1))
        self.frozen = frozen
        self.dtype = dtype

    def __call__(
        self,
        u: Float[Array, "B T C"],
        x: Float[Array, "B T D"],
        *,
        tail: Float[Array, "B P C"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
        """Convolves u on each device's rows and channels, with taps that x decides.

        See `kernels_pallas.dynamic_conv` for `tail`, `segment_ids` and the result.
        """
        w1, w2 = self.w1[...].astype(self.dtype), self.w2[...].astype(self.dtype)
        if self.frozen:
            w1, w2 = jax.lax.stop_gradient((w1, w2))
        h = jax.nn.silu(jnp.dot(x, w1, precision=precision(self.dtype)))

        def run(u, h, w2, b2, tail, segment_ids):
            return dynamic_conv(u, h, w2, b2, tail=tail, segment_ids=segment_ids)

        dims = ("bth", "btd", "dkh", "kh", "bkh", "bt")  # channels are split as heads are
        run = shard_kernel(run, dims, ("bth", "bkh"))
        return run(u, h, w2, self.b2[...].astype(self.dtype), tail, segment_ids)
