"""Low-rank projections of gates: two narrow matrices in place of one wide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jet_jax.models.linear import linear


class LowRank(nnx.Module):
    """`up(activation(down(x)))`; only `up` may have a bias. No activation is the identity."""

    def __init__(
        self,
        width: int,
        rank: int,
        outputs: int,
        *,
        use_bias: bool = False,
        activation: Callable[[Array], Array] | None = None,
        down_init: nnx.Initializer | None = None,
        up_init: nnx.Initializer | None = None,
        **formats: Any,
    ):
        self.down = linear(width, rank, kernel_init=down_init, **formats)
        self.up = linear(rank, outputs, use_bias=use_bias, kernel_init=up_init, **formats)
        self.activation = activation

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T F"]:
        """Projects every token."""
        y = self.down(x)
        return self.up(y if self.activation is None else self.activation(y))
