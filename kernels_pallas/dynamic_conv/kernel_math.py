"""The arithmetic of the fused kernels: pure functions of values, one tile of rows and channels.

With taps_j = round(h w2_j + b2_j), source_j the rows of u that tap j meets (row t-(W-1)+j; every
product with it counts as 0 where it is not the token's own) and dv the gradient of v, all
[rows, channels]:

    y = sum_j taps_j source_j            v       = silu(y)
    dy = dv silu'(y)                     dtaps_j = dy source_j
    du_s = sum_j parts_j[s + (W-1) - j]  parts_j = dy taps_j

Only `parts` cross rows; how they are shifted is the affair of the kernel that moves the data.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp

Tile = jax.Array
Own = jax.Array | None


def round_taps(sums: Sequence[Tile], dtype: jnp.dtype) -> list[Tile]:
    """Rounds h w2_j + b2_j, float32, to u's dtype, as every implementation does."""
    return [x.astype(dtype) for x in sums]


def convolve(taps: Sequence[Tile], sources: Iterable[Tile], owns: Sequence[Own]) -> Tile:
    """Returns y, the sum over taps, in float32.

    Args:
      taps: the taps.
      sources: the rows that they meet, own or not.
      owns: whether they are the token's own, [rows, 1]; None if they all are.
    """
    total = jnp.zeros(taps[0].shape, jnp.float32)
    for tap, source, own in zip(taps, sources, owns, strict=True):
        total += _only(own, tap.astype(jnp.float32) * source.astype(jnp.float32))
    return total


def _only(own: Own, x: Tile) -> Tile:
    """Clears what is not own: after the product, so that nothing leaks that is not finite."""
    return x if own is None else jnp.where(own, x, 0.0)


def silu(y: Tile) -> Tile:
    """Returns y sigmoid(y)."""
    return y * jax.nn.sigmoid(y)


def silu_gradient(y: Tile, dv: Tile) -> Tile:
    """Returns dy = dv silu'(y), float32."""
    gate = jax.nn.sigmoid(y)
    return dv.astype(jnp.float32) * gate * (1 + y * (1 - gate))


def tap_gradient(dy: Tile, source: Tile, own: Own) -> Tile:
    """Returns dtaps_j, float32."""
    return _only(own, dy * source.astype(jnp.float32))


def source_gradient(dy: Tile, tap: Tile, own: Own) -> Tile:
    """Returns parts_j, float32."""
    return _only(own, dy * tap.astype(jnp.float32))
