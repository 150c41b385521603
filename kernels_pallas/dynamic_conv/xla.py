"""The dynamic convolution as a sum of W shifted products.

Tap j of every token is one product [B·T, R] x [R, D], used at once against u shifted by W-1-j
rows, so one tap's values (D a token) exist at a time instead of all W of them. The op is wrapped
in `jax.checkpoint`: only its inputs are kept, and the backward pass computes the taps again.

Bytes moved at the least, forward: u, h and v once, taps written and read once (2·W·D values a
token); a fused kernel saves the taps.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.segments import segment_ordinals, segment_positions


def dynamic_conv_xla(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w2: Float[Array, "R W D"],
    b2: Float[Array, "W D"],
    *,
    tail: Float[Array, "B W-1 D"],
    has_tail: bool,
    segment_ids: Int[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Computes the op with shifts; `has_tail` says whether `tail` may hold anything but zeros."""
    run = jax.checkpoint(functools.partial(_shifted_sums, has_tail=has_tail))
    return run(u, h, w2.astype(u.dtype), b2.astype(u.dtype), tail, segment_ids)


def _shifted_sums(u, h, w2, b2, tail, segment_ids, *, has_tail):
    length, width = u.shape[1], w2.shape[1]
    history = width - 1
    # Row t of u is row t + history of `rows`.
    if segment_ids is None:
        rows = jnp.concatenate([tail.astype(u.dtype), u], axis=1)
        new_tail = rows[:, length:]
        sources = [rows[:, j : j + length] for j in range(width)]
    else:
        real = segment_ids != 0
        rows = jnp.pad(u, ((0, 0), (history, 0), (0, 0)))
        first = segment_ordinals(segment_ids) == 0
        if has_tail:  # directly before the first real row, over any leading padding
            start = jnp.argmax(real, axis=1)
            rows = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at, 0)))(
                rows, tail.astype(u.dtype), start
            )
        positions = segment_positions(segment_ids)
        seen = jnp.where(real, positions, history)
        sources = []
        for j in range(width):
            is_own = seen >= history - j
            if has_tail:
                is_own |= first
            sources.append(jnp.where(is_own[..., None], rows[:, j : j + length], 0))
        new_tail = _last_rows(rows, real, positions, first & has_tail, history)
    total = jnp.zeros(u.shape, jnp.result_type(u, jnp.float32))
    for j, source in enumerate(sources):
        taps = _taps(h, w2[:, j], b2[j])
        total += taps.astype(total.dtype) * source.astype(total.dtype)
    v = jax.nn.silu(total)
    if segment_ids is not None:
        v = jnp.where(real[..., None], v, 0)
    return v.astype(u.dtype), new_tail.astype(tail.dtype)


def _taps(h: Float[Array, "B T R"], w2: Float[Array, "R D"], b2: Float[Array, " D"]):
    """Returns one tap of every token and channel, [B, T, D], in h's dtype."""
    dtype = jnp.result_type(h, jnp.float32)
    precision = None if h.dtype == jnp.bfloat16 else "highest"
    taps = jnp.einsum("btr,rd->btd", h, w2, precision=precision, preferred_element_type=dtype)
    return (taps + b2.astype(dtype)).astype(h.dtype)


def _last_rows(rows, real, positions, continues, history):
    """Returns the W-1 rows up to each row's last real token, without those of other segments."""
    length = real.shape[1]
    any_real = real.any(axis=1)
    last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
    end = jnp.where(any_real, last + 1, 0)  # a row of padding keeps the tail, which lies at 0
    taken = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, history, axis=0))(
        rows, end
    )
    at_last = functools.partial(jnp.take_along_axis, indices=last[:, None], axis=1)
    count, is_continued = at_last(positions + 1)[:, 0], at_last(continues)[:, 0]
    count = jnp.where(any_real, count, 0)
    back = jnp.arange(history - 1, -1, -1)  # rows behind the last real one
    keep = (back[None] < count[:, None]) | (is_continued | ~any_real)[:, None]
    return jnp.where(keep[..., None], taken, 0)
