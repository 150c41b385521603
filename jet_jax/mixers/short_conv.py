"""The short convolution before a mixer, as a layer with weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jet_jax.sharding import shard_kernel
from kernels_pallas import short_conv


class ShortConv(nnx.Module):
    """Causal depthwise convolution of W taps, the current token's last.

    `taps` [W, C] and, if asked for, `bias` [C]. Both start uniform within ±1/sqrt(W), as in the
    published layers: taps of the size of other weights would let the values vanish.
    """

    def __init__(
        self,
        channels: int,
        taps: int,
        *,
        use_bias: bool,
        rngs: nnx.Rngs,
        param_dtype: Any = jnp.float32,
    ):
        limit = taps**-0.5

        def draw(*shape: int) -> jax.Array:
            key = rngs.params()
            return jax.random.uniform(key, shape, param_dtype, minval=-limit, maxval=limit)

        self.taps = nnx.Param(draw(taps, channels))
        self.bias = nnx.Param(draw(channels)) if use_bias else None

    def __call__(
        self,
        u: Float[Array, "B T C"],
        *,
        activation: str | None = "silu",
        tail: Float[Array, "B P C"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        dims: str = "h",
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
        """Convolves; `dims` is the letter of the channels on a mesh, "h" to split them as heads.

        See `kernels_pallas.short_conv` for the other arguments and the result.
        """
        bias = None if self.bias is None else self.bias[...]
        return convolve(
            u, self.taps[...], bias, activation, tail=tail, segment_ids=segment_ids, dims=dims
        )


def convolve(
    u: Float[Array, "B T C"],
    taps: Float[Array, "W C"],
    bias: Float[Array, " C"] | None,
    activation: str | None,
    *,
    tail: Float[Array, "B P C"] | None,
    segment_ids: Int[Array, "B T"] | None,
    dims: str,
) -> tuple[Float[Array, "B T C"], Float[Array, "B P C"]]:
    """`kernels_pallas.short_conv` on each device's rows and channels."""

    def run(u, taps, bias, tail, segment_ids):
        return short_conv(u, taps, bias, activation=activation, tail=tail, segment_ids=segment_ids)

    letters = [d + dims for d in ("bt", "k", "", "bk")]
    run = shard_kernel(run, (*letters, "bt"), (letters[0], letters[3]))
    return run(u, taps, bias, tail, segment_ids)
