"""Root-mean-square normalisation, plain, offset and gated, and normalisation by heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def normalise(x: Float[Array, "*B D"], eps: float) -> Float[Array, "*B D"]:
    """`x / sqrt(mean(x²) + eps)` over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x²) + eps) * (scale + offset)`, in float32, cast back to x's dtype.

    `offset` is 1 for Gemma, whose stored weight is the distance from one, and 0 elsewhere.
    Source: arXiv 1910.07467.
    """

    def __init__(
        self, width: int, eps: float, *, offset: float = 0.0, param_dtype: Any = jnp.float32
    ):
        self.eps = eps
        self.offset = offset
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Normalises the last axis."""
        y = normalise(x.astype(jnp.float32), self.eps)
        return (y * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm(x) * act(gate)`: the norm first, then the gate, both in float32.

    Source: the output norm of Gated DeltaNet (arXiv 2412.06464), where `act` is silu.
    """

    def __init__(
        self,
        width: int,
        eps: float,
        *,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
        param_dtype: Any = jnp.float32,
    ):
        super().__init__(width, eps, param_dtype=param_dtype)
        self.activation = activation

    def __call__(self, x: Float[Array, "*B V"], gate: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Normalises the last axis and gates it; returns the gate's dtype."""
        y = super().__call__(x.astype(jnp.float32))
        return (y * self.activation(gate.astype(jnp.float32))).astype(gate.dtype)


class GroupNorm(nnx.Module):
    """Each head's features to mean 0 and variance 1, then a scale and bias for every feature.

    Source: arXiv 1803.08494, with the heads as the groups and token by token.
    """

    def __init__(self, width: int, eps: float, *, scale: Any, param_dtype: Any = jnp.float32):
        self.eps = eps
        self.scale = nnx.Param(jnp.full((width,), scale, param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "*B H V"]) -> Float[Array, "*B H*V"]:
        """Normalises each head and joins them; float32."""
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = normalise(y, self.eps).reshape(*x.shape[:-2], -1)
        return y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
