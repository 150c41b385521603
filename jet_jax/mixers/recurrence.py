"""Runs a kernel of `kernels_pallas` inside a mixer: chunk or step, on a mesh, with padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jet_jax.mixers.context import Context
from jet_jax.sharding import shard_kernel

# Inputs that write to the state or decay it: all of them 0 leaves it as it is. A writing strength
# beta is narrower than the values that it writes, and enough.
STRENGTHS = ("g", "beta", "b")


def recur(
    chunk: Callable[..., tuple[Array, Array]],
    step: Callable[..., tuple[Array, Array]],
    inputs: Mapping[str, tuple[Any, str]],
    state: Float[Array, "B H K V"] | None,
    ctx: Context,
    *,
    state_dtype: Any,
    **options: Any,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Applies a recurrence on each device's rows and heads.

    Args:
      chunk: the operation over T tokens.
      step: the same for one token; taken where there is a state and T = 1.
      inputs: the operation's arguments in order: name → (array [B, T, …] or None, its dimensions in
        the letters of `sharding.constrain`).
      state: the state before the first token.
      ctx: the call's context. At T = 1 a padding token leaves the state as it is and its output is
        meaningless; in a chunk it is 0.
      state_dtype: dtype of the new state; a step keeps the old one's.
      **options: passed on to both.

    Returns:
      The outputs and the new state.
    """
    arrays = {name: array for name, (array, _) in inputs.items()}
    dims = [letters for _, letters in inputs.values()]
    if state is None or arrays["v"].shape[1] > 1:

        def run(*args):
            *tensors, initial_state, segment_ids = args
            return chunk(
                *tensors,
                initial_state=initial_state,
                segment_ids=segment_ids,
                state_dtype=state_dtype,
                **options,
            )

        run = shard_kernel(run, (*dims, "bhkv", "bt"), ("bthv", "bhkv"))
        return run(*arrays.values(), state, ctx.segment_ids)
    tokens = {name: None if x is None else x[:, 0] for name, x in arrays.items()}
    if ctx.segment_ids is not None:
        real = ctx.segment_ids[:, 0] != 0
        for name in STRENGTHS if tokens.get("beta") is not None else (*STRENGTHS, "v"):
            x = tokens.get(name)
            if x is not None:
                tokens[name] = jnp.where(real.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
    letters = (*(d.replace("t", "") for d in dims), "bhkv")
    o, new = shard_kernel(partial(step, **options), letters, ("bhv", "bhkv"))(
        *tokens.values(), state
    )
    return o[:, None], new
