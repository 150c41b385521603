"""The window of rows that a causal convolution sees at each token: the specification."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.segments import segment_ordinals


def windows(
    u: Float[Array, "B T D"],
    tail: Float[Array, "B P D"],
    segment_ids: Int[Array, "B T"],
) -> tuple[Float[Array, "B T W D"], Float[Array, "B P D"]]:
    """Slides a window of the last W = P+1 rows over the tokens, one token after another.

    Args:
      u: rows.
      tail: the P rows before them.
      segment_ids: 0 for padding, which is passed over; every segment but the first starts from 0.

    Returns:
      The windows, oldest row first, in float32 at least, and the rows that the next call's tokens
      follow, in the tail's dtype.
    """
    dtype = jnp.result_type(u, jnp.float32)
    is_reset = jnp.diff(segment_ordinals(segment_ids), axis=1, prepend=0) > 0

    def step(past, token):
        row, is_real, is_reset = token
        before = jnp.where(is_reset[:, None, None], 0, past)
        window = jnp.concatenate([before, row[:, None]], axis=1)
        return jnp.where(is_real[:, None, None], window[:, 1:], past), window

    tokens = (u.astype(dtype), segment_ids != 0, is_reset)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    past, found = jax.lax.scan(step, tail.astype(dtype), tokens)
    return jnp.moveaxis(found, 0, 1), past.astype(tail.dtype)
