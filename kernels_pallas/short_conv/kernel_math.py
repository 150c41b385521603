"""The arithmetic of the kernels: pure functions of values, of a row or of a tile of rows.

With source_j the rows of u that tap j meets (row t-(W-1)+j; 0 where it is not the token's own),
x the sum before the activation and dy the gradient of y, all in float32:

    x = b + sum_j w_j source_j           y    = silu(x)  or  x
    dx = dy silu'(x)  or  dy             dw_j = sum_t dx source_j      db = sum_t dx
    du_s = sum_j w_j dx[s + (W-1) - j]   over tokens whose own row s is

Weights are [W, channels] or, with a bias, [W+1, channels], the bias last.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.backend import multiply_add, sigmoid

Tile = jax.Array
Own = jax.Array | None


def convolve(weights: Sequence[Tile], sources: Sequence[Tile]) -> Tile:
    """Returns x; there is one more weight than sources if there is a bias."""
    (first, *taps), width = weights, len(sources)
    has_bias = len(weights) > width
    total = multiply_add(first, sources[0], weights[-1]) if has_bias else first * sources[0]
    for tap, source in zip(taps[: width - 1], sources[1:], strict=True):
        total = multiply_add(tap, source, total)
    return total


def activate(x: Tile, activation: str | None) -> Tile:
    """Returns y."""
    return x * sigmoid(x) if activation == "silu" else x


def activation_gradient(x: Tile, dy: Tile, activation: str | None) -> Tile:
    """Returns dx, with silu' = gate + silu (1 - gate)."""
    dy = dy.astype(jnp.float32)
    if activation != "silu":
        return dy
    gate = sigmoid(x)
    return dy * multiply_add(x * gate, 1 - gate, gate)


def only(own: Own, x: Tile, other: Tile | float = 0.0) -> Tile:
    """Takes `other` where x is not own, so that nothing leaks that is not finite; None is all."""
    return x if own is None else jnp.where(own, x, other)
