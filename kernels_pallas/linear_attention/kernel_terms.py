"""What one chunk alone determines, as the kernels hand it from one to another.

Notation as in chunks.py, for one head: O = Q̂ S + Y V and S' = e^{G_C} S + K_eᵀ V. With one decay a
head Q̂ and K_e are the queries and keys themselves and a factor a row; with one a key channel they
are rows of their own, already decayed.
"""

from typing import Any, NamedTuple

import jax


class Terms(NamedTuple):
    """Arrays of all chunks, references to them in a kernel, or block specs."""

    read: Any  # queries, or Q̂; rows in the kernels' layout
    read_factor: Any  # Q̂ = factor · read, [B, HV, N, C] float32; None is 1
    write: Any  # keys, or K_e
    write_factor: Any  # K_e = factor · write; None is 1
    scores: Any  # Y [B, HV, T, C] in the rows' dtype
    whole: Any  # e^{G_C} [B, HV, N, 1 or K] float32


def where_given(arrays: Any, specs: Any) -> Any:
    """Keeps the specs of the arrays that are there."""
    return jax.tree.map(
        lambda x, spec: None if x is None else spec, arrays, specs, is_leaf=lambda x: x is None
    )
