"""What lies before each token of a causal convolution: the tail, segments, other devices.

A convolution of W taps needs the W-1 rows before a token. They come from the same call, from the
`tail` an earlier call handed over, or, where the tokens are split over devices, from the device
to the left. `seen` counts how many of them belong to the token's own segment; the others are 0.
Both convolutions, and all their implementations, take their history from here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Int32

from kernels_pallas.segments import segment_positions


class History(NamedTuple):
    """The rows and counts that precede the tokens of one call, on one device.

    Attributes:
      before: [B, W-1, D] rows that lie directly before row `start`, in u's dtype; None is zeros.
      start: [B] index of the row that `before` precedes (whatever lies there is padding); None
        is 0.
      seen: [B, T] how many of the W-1 rows before a token are its own, -1 for padding; None where
        all are, `before` included.
    """

    before: Float[Array, "B P D"] | None
    start: Int32[Array, " B"] | None
    seen: Int32[Array, "B T"] | None


def check_tail(
    sizes: dict[str, int], u: jax.Array, tail: ArrayLike | None
) -> tuple[jax.Array, bool]:
    """Checks an incoming tail [B, W-1, D] and returns it, or zeros, and whether there was one.

    Raises:
      ValueError: a shape other than [B, W-1, D], or not floating point.
    """
    expected = (sizes["B"], sizes["W"] - 1, sizes["D"])
    if tail is None:
        return jnp.zeros(expected, u.dtype), False
    tail = jnp.asarray(tail)
    if tuple(tail.shape) != expected:
        raise ValueError(
            f"tail has shape {tuple(tail.shape)}, "
            f"expected [B={expected[0]}, W-1={expected[1]}, D={expected[2]}]"
        )
    if not jnp.issubdtype(tail.dtype, jnp.floating):
        raise ValueError(f"tail has dtype {tail.dtype}, expected a floating-point dtype")
    return tail, True


def history(
    u: Float[Array, "B T D"],
    tail: Float[Array, "B P D"],
    has_tail: bool,
    segment_ids: Int[Array, "B T"] | None,
    axis_name: str | None = None,
) -> tuple[History, Float[Array, "B P D"]]:
    """Works out the history of a call and the tail that the next call takes.

    Args:
      u: the convolution's input.
      tail: rows from before the call, of any floating-point dtype.
      has_tail: whether `tail` may hold anything but zeros.
      segment_ids: 0 for padding; None is one segment a row.
      axis_name: axis of the caller's `shard_map` over which T is split, in order; the tail is the
        same on every device of it.

    Returns:
      The history, and the new tail in the tail's dtype, the same on every device of the axis.

    Raises:
      ValueError: a device's T is shorter than W-1, so that rows would come from two devices away.
    """
    if axis_name is not None and u.shape[1] < tail.shape[1]:
        raise ValueError(
            f"axis_name={axis_name!r} leaves T={u.shape[1]} tokens a device, fewer than the "
            f"W-1={tail.shape[1]} that the convolution looks back; split T over fewer devices"
        )
    if segment_ids is None:
        return _whole_rows(u, tail, has_tail, axis_name)
    return _packed_rows(u, tail, has_tail, segment_ids, axis_name)


def _whole_rows(u, tail, has_tail, axis_name):
    width = tail.shape[1]
    ends = u[:, max(u.shape[1] - width, 0) :].astype(tail.dtype)
    new_tail = jnp.concatenate([tail, ends], axis=1)[:, -width:]
    if axis_name is None:
        return History(tail.astype(u.dtype) if has_tail else None, None, None), new_tail
    index = jax.lax.axis_index(axis_name)
    left = _from_left(u[:, -width:], axis_name)  # zeros on the first device
    before = jnp.where(index == 0, tail.astype(u.dtype), left) if has_tail else left
    is_last = index == jax.lax.axis_size(axis_name) - 1
    return History(before, None, None), jax.lax.psum(jnp.where(is_last, new_tail, 0), axis_name)


def _packed_rows(u, tail, has_tail, segment_ids, axis_name):
    width, length = tail.shape[1], u.shape[1]
    real = segment_ids != 0
    any_real = real.any(axis=1)
    start = jnp.argmax(real, axis=1).astype(jnp.int32)
    first_id = jnp.take_along_axis(segment_ids, start[:, None], axis=1)  # 0 where all is padding
    before = tail.astype(u.dtype) if has_tail else None
    if axis_name is None:
        positions = segment_positions(segment_ids)
    else:
        # Ids do not recur, so the first segment of the whole row is known by its id.
        firsts = jax.lax.all_gather(first_id[:, 0], axis_name)  # [devices, B]
        earlier = jnp.arange(firsts.shape[0])[:, None] < jax.lax.axis_index(axis_name)
        follows = ((firsts != 0) & earlier).any(axis=0)
        first_id = jnp.take_along_axis(firsts, jnp.argmax(firsts != 0, axis=0)[None], axis=0).T
        ids = jnp.concatenate([_from_left(segment_ids[:, -width:], axis_name), segment_ids], axis=1)
        positions = segment_positions(ids)[:, width:]  # right up to W-1
        start = jnp.where(follows, 0, start) if has_tail else jnp.zeros_like(start)
        ends = _rows(u, before, start, length - width + jnp.arange(width)[None])
        left = _from_left(ends, axis_name)
        before = left if before is None else jnp.where(follows[:, None, None], left, before)
    seen = jnp.minimum(positions, width)
    if has_tail:
        seen = jnp.where(segment_ids == first_id, width, seen)
    seen = jnp.where(real, seen, -1)

    last = (length - 1 - jnp.argmax(real[:, ::-1], axis=1))[:, None]
    back = jnp.arange(width - 1, -1, -1)[None]  # rows behind the last real one
    kept = back <= jnp.take_along_axis(seen, last, axis=1)
    new_tail = _rows(u, before, start, last - back).astype(tail.dtype)
    new_tail = jnp.where(kept[..., None], new_tail, 0)
    if axis_name is None:
        new_tail = jnp.where(any_real[:, None, None], new_tail, tail)
    else:
        new_tail = _from_last_real(new_tail, tail, any_real, axis_name)
    return History(before, start if before is not None else None, seen), new_tail


def _rows(u, before, start, index):
    """Returns rows [B, n] of u; those ahead of `start` come from `before`, which ends there."""
    length = u.shape[1]
    rows = jnp.take_along_axis(u, jnp.clip(index, 0, length - 1)[..., None], axis=1)
    if before is None:
        return rows
    width = before.shape[1]
    at = index - start[:, None]
    ahead = jnp.take_along_axis(before, jnp.clip(at + width, 0, width - 1)[..., None], axis=1)
    return jnp.where((at < 0)[..., None], ahead.astype(u.dtype), rows)


def _from_left(x, axis_name):
    """Returns the array of the device to the left; zeros on the first."""
    size = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(x, axis_name, [(i, i + 1) for i in range(size - 1)])


def _from_last_real(candidate, tail, any_real, axis_name):
    """Returns the tail of the last device that holds a real token, on every device."""
    flags = jax.lax.all_gather(any_real, axis_name)  # [devices, B]
    later = jnp.arange(flags.shape[0])[:, None] > jax.lax.axis_index(axis_name)
    is_last = any_real & ~(flags & later).any(axis=0)
    # Only one device adds anything but zeros, so the sum rounds nothing.
    chosen = jax.lax.psum(jnp.where(is_last[:, None, None], candidate, 0), axis_name)
    return jnp.where(flags.any(axis=0)[:, None, None], chosen, tail)


def sources(u: Float[Array, "B T D"], past: History, width: int) -> list[Float[Array, "B T D"]]:
    """Returns W arrays: element j holds, for each token, row t-(W-1)+j of its segment or 0."""
    before = past.before
    if before is None or past.start is not None:
        rows = jnp.pad(u, ((0, 0), (width - 1, 0), (0, 0)))
        if before is not None:
            rows = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at, 0)))(
                rows, before, past.start
            )
    else:
        rows = jnp.concatenate([before, u], axis=1)
    shifted = [rows[:, j : j + u.shape[1]] for j in range(width)]
    if past.seen is None:
        return shifted
    own = [past.seen >= width - 1 - j for j in range(width)]
    return [jnp.where(o[..., None], x, 0) for o, x in zip(own, shifted, strict=True)]


def own_rows(u: Float[Array, "B T D"], past: History) -> Int32[Array, "B T"] | None:
    """Returns `seen` without the rows of `before`; None where all are own from row 0 on."""
    if past.seen is None or past.before is None:
        return past.seen
    start = 0 if past.start is None else past.start[:, None]
    return jnp.minimum(past.seen, jnp.arange(u.shape[1], dtype=jnp.int32) - start)


def replace_first_rows(
    y: Float[Array, "B T D"],
    arrays: Sequence[Float[Array, "B T _"]],
    past: History,
    compute: Callable[..., Float[Array, "B P D"]],
) -> Float[Array, "B T D"]:
    """Replaces the outputs that rows from before the call reach, if there may be any.

    For kernels that know the rows of one call only.

    Args:
      y: the outputs, right where only `own_rows` matter.
      arrays: what the convolution takes for each token.
      past: the history.
      compute: makes the outputs of a few tokens from `arrays`, cut to them, and their history.

    Returns:
      y with the W-1 outputs from row `start` on computed again.
    """
    if past.before is None:
        return y
    count = past.before.shape[1]
    if past.start is None:
        return y.at[:, :count].set(compute(*(x[:, :count] for x in arrays), past))
    at = jnp.minimum(past.start, y.shape[1] - count)

    def cut(x):
        return jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, count))(x, at)

    window = History(past.before, past.start - at, cut(past.seen))
    first = compute(*map(cut, arrays), window)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.vmap(put)(y, first, at)
