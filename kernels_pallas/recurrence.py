"""Running a recurrence token by token, with the segments and padding that every operation has."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.segments import segment_ordinals


def scan_tokens(
    update: Callable[..., tuple[jax.Array, jax.Array]],
    tokens: Sequence[Float[Array, "B T H ..."]],
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_shape: tuple[int, ...],
    dtype: Any,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs `update` over T with `lax.scan`.

    Args:
      update: takes the state and a token's part of each of `tokens`; returns the new state and the
        token's output [B, H, V].
      tokens: what a token consists of, in `dtype`.
      initial_state: the state before the first token; None is zeros.
      segment_ids: 0 for padding, which leaves the state untouched and outputs 0; the state restarts
        from zeros at every segment but the row's first. None is one segment.
      state_shape: (B, H, K, V).
      dtype: dtype of the state.

    Returns:
      The outputs and the state after the last real token, in `dtype`.
    """
    batch, length = tokens[0].shape[:2]
    if initial_state is None:
        state = jnp.zeros(state_shape, dtype)
    else:
        state = initial_state.astype(dtype)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    ordinals = segment_ordinals(segment_ids)
    # The first segment continues the initial state; every later one starts from zeros.
    is_reset = jnp.diff(ordinals, axis=1, prepend=0) > 0

    def step(state, token):
        *token, is_real, is_reset = token
        start = jnp.where(is_reset[:, None, None, None], 0, state)
        written, o = update(start, *token)
        state = jnp.where(is_real[:, None, None, None], written, state)
        return state, jnp.where(is_real[:, None, None], o, 0)

    by_token = [jnp.moveaxis(x, 1, 0) for x in (*tokens, segment_ids != 0, is_reset)]
    state, o = jax.lax.scan(step, state, by_token)
    return jnp.moveaxis(o, 0, 1), state
