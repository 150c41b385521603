"""Checks of shapes and dtypes, with messages that name the argument."""

import jax
import jax.numpy as jnp


def check_array(sizes: dict[str, int], name: str, array: jax.Array, dims: str) -> None:
    """Checks one floating-point argument and records the sizes of its dimensions.

    Args:
      sizes: sizes known so far, by dimension name; new ones are added.
      name: the argument's name.
      array: the argument.
      dims: its dimension names, separated by spaces, such as "B T H K".

    Raises:
      ValueError: wrong rank, a size that contradicts an earlier argument, or not floating point.
    """
    names = dims.split()
    known = ", ".join(f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in names)
    fits = len(array.shape) == len(names) and all(
        sizes.get(dim, size) == size for dim, size in zip(names, array.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected [{known}]")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {array.dtype}, expected a floating-point dtype")
    sizes.update(zip(names, array.shape, strict=True))


def check_segment_ids(sizes: dict[str, int], segment_ids: jax.Array) -> None:
    """Checks shape [B, T] and an integer dtype; values are `validate_segment_ids`' business.

    Raises:
      ValueError: wrong shape or not an integer dtype.
    """
    expected = (sizes["B"], sizes["T"])
    if tuple(segment_ids.shape) != expected:
        raise ValueError(
            f"segment_ids has shape {tuple(segment_ids.shape)}, "
            f"expected [B={expected[0]}, T={expected[1]}]"
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"segment_ids has dtype {segment_ids.dtype}, expected int32")


def check_same_dtype(**arrays: jax.Array) -> None:
    """Checks that the arguments share one dtype.

    Raises:
      ValueError: they do not; the message lists every name and dtype.
    """
    if len({array.dtype for array in arrays.values()}) > 1:
        listed = ", ".join(f"{name} {array.dtype}" for name, array in arrays.items())
        raise ValueError(f"expected one dtype, got {listed}; cast them to the same dtype")
