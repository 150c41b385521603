"""T cut into segments that walk side by side, as rows of the batch, or split over devices."""

import jax
import jax.numpy as jnp

from kernels_pallas.gated_delta_rule.blocks import CHUNK
from kernels_pallas.segments import segment_ordinals


def pad_time(x: jax.Array, count: int) -> jax.Array:
    return x if count == 0 else jnp.pad(x, [(0, 0), (0, count)] + [(0, 0)] * (x.ndim - 2))


def ordinals_over_devices(segment_ids: jax.Array, axis_name: str) -> tuple[jax.Array, jax.Array]:
    """Numbers a row's segments over all devices, and tells the number before this device's part."""
    length = segment_ids.shape[1]
    whole = jax.lax.all_gather(segment_ids, axis_name, axis=1, tiled=True)
    ordinals = jnp.pad(segment_ordinals(whole), ((0, 0), (1, 0)))
    start = jax.lax.axis_index(axis_name) * length
    own = jax.lax.dynamic_slice_in_dim(ordinals, start, length + 1, axis=1)
    return own[:, 1:], own[:, 0]


def count_segments(programs: int, length: int, *, enough: int, most: int) -> int:
    """Returns how many segments fill the device, a power of two, each 32 chunks long or more.

    Args:
      programs: programs of a walk over the whole of T.
      length: T.
      enough: programs that keep the device busy; with these T is not cut.
      most: programs to cut the walk into otherwise.
    """
    segments = 1
    if programs >= enough:
        return segments
    while 2 * segments * programs <= most and length >= 2 * segments * 32 * CHUNK:
        segments *= 2
    return segments


def by_segment(x: jax.Array, segments: int) -> jax.Array:
    """Brings [B·S, ...] to [S, B, ...]."""
    return jnp.swapaxes(x.reshape(-1, segments, *x.shape[1:]), 0, 1)


def by_row(x: jax.Array) -> jax.Array:
    """Brings [S, B, ...] to [B·S, ...]."""
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])
