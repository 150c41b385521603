"""Segment ids of packed and padded rows.

A row of `segment_ids` [B, T] holds a non-zero id for each real token and 0 for padding. A segment
is a maximal run of one non-zero id; ids rise along the row and none recurs. States, convolution
tails and attention never cross from one segment into another, and padding leaves them untouched.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32


def validate_segment_ids(segment_ids: np.ndarray) -> None:
    """Checks segment ids on the host, before they reach a compiled function.

    Args:
      segment_ids: [B, T] integers.

    Raises:
      ValueError: wrong rank or dtype, a negative id, an id below one that came before it in its
        row, or an id that recurs after padding; the message names row, column and id.
    """
    ids = np.asarray(segment_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"segment_ids has shape {ids.shape} and dtype {ids.dtype}, expected integers [B, T]"
        )
    if ids.size == 0:
        return

    def fail(bad: np.ndarray, what: str) -> None:
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"segment_ids row {row}, column {column}: id {int(ids[row, column])} {what}; "
                "number the documents of a row 1, 2, 3, ... from left to right and padding 0"
            )

    fail(ids < 0, "is negative")
    before = np.concatenate([np.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1)
    highest = np.maximum.accumulate(before, axis=1)
    real = ids != 0
    fail(real & (ids < highest), "is lower than an id before it (ids must not fall)")
    fail(real & (ids == highest) & (before == 0), "recurs after padding (a segment is one run)")


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns True at the first token of every segment."""
    before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
    return (segment_ids != 0) & (segment_ids != before)


def segment_ordinals(segment_ids: Int[Array, "B T"]) -> Int32[Array, "B T"]:
    """Numbers the segments of a row 0, 1, 2, ...; padding takes the number of what precedes it.

    Leading padding is numbered 0 like the first segment, so an initial state belongs to exactly
    the tokens numbered 0.
    """
    runs = jnp.cumsum(segment_starts(segment_ids), axis=1, dtype=jnp.int32)
    return jnp.maximum(runs - 1, 0)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int32[Array, "B T"]:
    """Counts the tokens of each segment from 0; padding gets 0."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    start = jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)
    return jnp.where(segment_ids != 0, index - start, 0)
