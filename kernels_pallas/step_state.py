"""Blocks of the states that decoding steps update in place, for the steps' kernels."""

import jax
import jax.numpy as jnp


def inside_mask(shape: tuple[int, ...], *, start: jax.Array, width: int) -> jax.Array | None:
    """Returns which columns of a block exist; None where blocks divide V and so all do."""
    if width % shape[-1] == 0:
        return None
    return start + jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) < width


def check_step_supported(q: jax.Array, v: jax.Array, state: jax.Array) -> None:
    """Raises NotImplementedError, with the reason, for what the kernel does not take."""
    if state.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"state is {state.dtype}: the kernel takes bfloat16 or float32")
    if v.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"q, k and v are {v.dtype}: the kernel takes bfloat16 or float32")
    key_width, width = q.shape[-1], v.shape[-1]
    if key_width % 32 or not 32 <= key_width <= 256:
        raise NotImplementedError(
            f"q and k have K={key_width}: the kernel takes multiples of 32 up to 256"
        )
    if width % 16 or width > 1024:
        raise NotImplementedError(f"v has V={width}: the kernel takes multiples of 16 up to 1024")


def heads_a_program(state: jax.Array, repeats: int, limit: int) -> int:
    """Returns how many heads a program takes on a TPU.

    Args:
      state: [B, HV, K, V].
      repeats: value heads that share a query and key head.
      limit: bytes of states a program may take.

    Returns:
      The largest divisor of HV within the limit that is whole groups of `repeats` heads or an equal
      part of one, so that every program's queries are one block; at least 1.
    """
    heads = state.shape[1]
    one = state.shape[2] * state.shape[3] * state.dtype.itemsize
    fitting = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and (n % repeats == 0 or repeats % n == 0) and n * one <= limit
    ]
    return max(fitting, default=1)


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of an array."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
