"""The dynamic convolution as a sum of W shifted products.

Tap j of every token is one product [B·T, R] x [R, D], used at once against u shifted by W-1-j
rows, so one tap's values (D a token) exist at a time instead of all W of them. The op is wrapped
in `jax.checkpoint`: only its inputs are kept, and the backward pass computes the taps again.

Bytes moved at the least, forward: u, h and v once, taps written and read once (2·W·D values a
token); the fused kernel saves the taps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.conv_history import History, history, sources


def dynamic_conv_xla(
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
    """Computes the op with shifts; `has_tail` says whether `tail` may hold anything but zeros."""
    past, new_tail = history(u, tail, has_tail, segment_ids, axis_name)
    v = shifted_sums(u, h, w2.astype(u.dtype), b2.astype(u.dtype), past)
    return v, new_tail


@jax.checkpoint
def shifted_sums(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w2: Float[Array, "R W D"],
    b2: Float[Array, "W D"],
    past: History,
) -> Float[Array, "B T D"]:
    """The convolution and SiLU, given the history; padding comes out as 0."""
    total = jnp.zeros(u.shape, jnp.result_type(u, jnp.float32))
    for j, source in enumerate(sources(u, past, w2.shape[1])):
        taps = _taps(h, w2[:, j], b2[j])
        total += taps.astype(total.dtype) * source.astype(total.dtype)
    return jax.nn.silu(total).astype(u.dtype)


def _taps(h: Float[Array, "B T R"], w2: Float[Array, "R D"], b2: Float[Array, " D"]):
    """Returns one tap of every token and channel, [B, T, D], in h's dtype."""
    dtype = jnp.result_type(h, jnp.float32)
    precision = None if h.dtype == jnp.bfloat16 else "highest"
    taps = jnp.einsum("btr,rd->btd", h, w2, precision=precision, preferred_element_type=dtype)
    return (taps + b2.astype(dtype)).astype(h.dtype)
