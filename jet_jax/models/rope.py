"""Rotary position embedding with the default, linear, llama3 and yarn frequency rules.

Sources: RoFormer arXiv 2104.09864; YaRN arXiv 2309.00071 §3; Llama 3.1's frequency rule as
transformers documents it. Frequencies and angles are float32, as in the reference.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jet_jax.mixer_options import RopeOptions


def _yarn(rope: RopeOptions, head_dim: int, frequencies: np.ndarray) -> np.ndarray:
    """Blends interpolated (slow) and original (fast) frequencies over a linear ramp."""
    original = rope.original_max_position_embeddings or 1

    def dimension(rotations: float) -> float:
        return (
            head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))
        )

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # keeps the ramp finite
    index = np.arange(head_dim // 2, dtype=np.float32)
    original_share = 1 - np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    interpolated = frequencies / np.float32(rope.factor)
    return interpolated * (1 - original_share) + frequencies * original_share


def _llama3(rope: RopeOptions, frequencies: np.ndarray) -> np.ndarray:
    """Divides slow frequencies by the factor, keeps fast ones, blends between."""
    original = np.float32(rope.original_max_position_embeddings or 1)
    wavelength = np.float32(2 * math.pi) / frequencies
    span = np.float32(rope.high_freq_factor - rope.low_freq_factor)
    smooth = (original / wavelength - np.float32(rope.low_freq_factor)) / span
    factor = np.float32(rope.factor)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    out = np.where(
        wavelength > original / np.float32(rope.low_freq_factor), frequencies / factor, blended
    )
    return np.where(wavelength < original / np.float32(rope.high_freq_factor), frequencies, out)


def frequencies(rope: RopeOptions, head_dim: int) -> np.ndarray:
    """Inverse frequencies in radians a token: float32 [head_dim / 2]."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base = 1.0 / np.power(np.float32(rope.theta), exponent)
    if rope.kind == "linear":
        base = base / np.float32(rope.factor)
    elif rope.kind == "llama3":
        base = _llama3(rope, base)
    elif rope.kind == "yarn":
        base = _yarn(rope, head_dim, base)
    return base.astype(np.float32)


def attention_factor(rope: RopeOptions) -> float:
    """What cos and sin are multiplied by: 1 but for yarn, whose default is 0.1·ln(factor) + 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def apply_rope(
    x: Float[Array, "B T N d"], positions: Int[Array, "B T"], rope: RopeOptions
) -> Float[Array, "B T N d"]:
    """Rotates each head by its token's position, pairing the two halves of the head.

    Args:
      x: queries or keys.
      positions: token positions, counted from 0 in each sequence.
      rope: the options.

    Returns:
      The rotated heads in x's dtype.
    """
    half = x.shape[-1] // 2
    angles = positions[..., None].astype(jnp.float32) * frequencies(rope, x.shape[-1])
    factor = attention_factor(rope)
    cos = (jnp.cos(angles) * factor).astype(x.dtype)[:, :, None]
    sin = (jnp.sin(angles) * factor).astype(x.dtype)[:, :, None]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
