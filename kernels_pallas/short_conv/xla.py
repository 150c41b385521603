"""The short convolution as a sum of W shifted products, which XLA fuses into one pass.

Only the inputs are kept for the backward pass (`jax.checkpoint`). Bytes moved, forward: u and y
once, the shifted reads come from the cache.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.conv_history import History, history, sources


def short_conv_xla(
    u: Float[Array, "B T D"],
    w: Float[Array, "W D"],
    b: Float[Array, " D"] | None,
    *,
    activation: str | None,
    tail: Float[Array, "B W-1 D"],
    has_tail: bool,
    segment_ids: Int[Array, "B T"] | None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Computes the op with shifts; `has_tail` says whether `tail` may hold anything but zeros."""
    past, new_tail = history(u, tail, has_tail, segment_ids, axis_name)
    run = jax.checkpoint(functools.partial(shifted_sums, activation=activation))
    return run(u, w.astype(u.dtype), None if b is None else b.astype(u.dtype), past), new_tail


def shifted_sums(
    u: Float[Array, "B T D"],
    w: Float[Array, "W D"],
    b: Float[Array, " D"] | None,
    past: History,
    *,
    activation: str | None,
) -> Float[Array, "B T D"]:
    """The convolution and its activation, given the history; padding comes out as 0."""
    dtype = jnp.result_type(u, jnp.float32)
    total = jnp.zeros(u.shape, dtype) if b is None else jnp.broadcast_to(b.astype(dtype), u.shape)
    for tap, source in zip(w, sources(u, past, len(w)), strict=True):
        total += tap.astype(dtype) * source.astype(dtype)
    y = jax.nn.silu(total) if activation == "silu" else total
    if past.seen is not None and b is not None:
        y = jnp.where((past.seen >= 0)[..., None], y, 0)
    return y.astype(u.dtype)
