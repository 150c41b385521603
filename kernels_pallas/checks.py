"""Checks of shapes and dtypes, with messages that name the argument."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


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


def check_heads(sizes: dict[str, int]) -> None:
    """Checks that value heads come in equal groups.

    Raises:
      ValueError: HV is not a multiple of H.
    """
    if sizes["HV"] % sizes["H"]:
        raise ValueError(
            f"v has HV={sizes['HV']} heads and q, k have H={sizes['H']}: HV must be a multiple of H"
        )


def check_sequence_options(
    sizes: dict[str, int],
    segment_ids: jax.Array | None,
    chunk_size: int,
    state_dtype: DTypeLike,
) -> None:
    """Checks what the operations over a sequence have in common.

    Raises:
      ValueError: no tokens, or bad segment_ids, chunk_size or state_dtype.
    """
    if sizes["T"] == 0:
        raise ValueError("q has T=0 tokens, expected at least one")
    if segment_ids is not None:
        check_segment_ids(sizes, segment_ids)
    if chunk_size not in (16, 32, 64, 128, 256):
        raise ValueError(f"chunk_size={chunk_size}, expected 16, 32, 64, 128 or 256")
    if not jnp.issubdtype(state_dtype, jnp.floating):
        raise ValueError(f"state_dtype={state_dtype}, expected a floating-point dtype")


def check_state_dtype(state: jax.Array) -> None:
    """Checks the dtype of a decoding state.

    Raises:
      ValueError: it is none that a step can keep.
    """
    if state.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"state has dtype {state.dtype}, expected float32 or bfloat16")
