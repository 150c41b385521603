"""The dynamic convolution, one token after another: the specification of the operation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.segments import segment_ordinals


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
    """Slides a window of the last W rows over the tokens; `has_tail` has no effect on it."""
    del has_tail
    if axis_name is not None:
        raise NotImplementedError("axis_name is not supported")
    stored = u.dtype
    dtype = jnp.result_type(stored, jnp.float32)
    w2, b2 = w2.astype(stored).astype(dtype), b2.astype(stored).astype(dtype)
    if segment_ids is None:
        segment_ids = jnp.ones(u.shape[:2], jnp.int32)
    is_reset = jnp.diff(segment_ordinals(segment_ids), axis=1, prepend=0) > 0

    def step(history, token):
        u, h, is_real, is_reset = token
        before = jnp.where(is_reset[:, None, None], 0, history)
        window = jnp.concatenate([before, u[:, None]], axis=1)
        taps = jnp.einsum("br,rwd->bwd", h, w2, precision="highest") + b2
        taps = taps.astype(stored).astype(dtype)
        v = jax.nn.silu(jnp.sum(taps * window, axis=1))
        history = jnp.where(is_real[:, None, None], window[:, 1:], history)
        return history, jnp.where(is_real[:, None], v, 0)

    tokens = (u.astype(dtype), h.astype(dtype), segment_ids != 0, is_reset)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    history, v = jax.lax.scan(step, tail.astype(dtype), tokens)
    return jnp.moveaxis(v, 0, 1).astype(stored), history.astype(tail.dtype)
