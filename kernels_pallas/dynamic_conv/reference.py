"""The dynamic convolution, window by window: the specification of the operation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.conv_windows import windows


def dynamic_conv_reference(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w2: Float[Array, "R W D"],
    b2: Float[Array, "W D"],
    *,
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
    dtype, stored = window.dtype, u.dtype
    w2, b2 = w2.astype(stored).astype(dtype), b2.astype(stored).astype(dtype)
    taps = jnp.einsum("btr,rwd->btwd", h.astype(dtype), w2, precision="highest") + b2
    v = jax.nn.silu(jnp.sum(taps.astype(stored).astype(dtype) * window, axis=2))
    return jnp.where((segment_ids != 0)[..., None], v, 0).astype(stored), new_tail
