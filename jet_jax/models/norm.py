"""Root-mean-square normalisation, plain, offset and gated."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


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
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * (self.scale[...].astype(jnp.float32) + self.offset)).astype(x.dtype)


class GatedRMSNorm(RMSNorm):
    """`RMSNorm(x) * silu(gate)`: the norm first, then the gate, both in float32.

    Source: the output norm of Gated DeltaNet (arXiv 2412.06464) as the JetBlock uses it.
    """

    def __call__(self, x: Float[Array, "*B V"], gate: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Normalises the last axis and gates it; returns the gate's dtype."""
        y = super().__call__(x.astype(jnp.float32))
        return (y * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)
