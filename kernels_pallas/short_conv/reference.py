"""The short convolution, window by window: the specification of the operation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.conv_windows import windows


def short_conv_reference(
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
    """Sums each token's window; `has_tail` has no effect on it."""
    del has_tail
    if axis_name is not None:
        raise NotImplementedError("axis_name is not supported")
    if segment_ids is None:
        segment_ids = jnp.ones(u.shape[:2], jnp.int32)
    window, new_tail = windows(u, tail, segment_ids)
    dtype = window.dtype
    y = jnp.sum(w.astype(u.dtype).astype(dtype) * window, axis=2)
    if b is not None:
        y += b.astype(u.dtype).astype(dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    return jnp.where((segment_ids != 0)[..., None], y, 0).astype(u.dtype), new_tail
