"""Checks and conversions of what callers of generation give, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from jet_jax.config import ModelConfig

_STOP_SLOTS = 8  # stop ids are padded to a multiple of this, so that their number compiles nothing


def check_prompts(prompts: Sequence[Any], vocab_size: int) -> list[Int32[np.ndarray, " T"]]:
    """The prompts as arrays of token ids.

    Args:
      prompts: lists or 1-d integer arrays, of any lengths.
      vocab_size: ids must lie below it.

    Raises:
      ValueError: for text, an empty prompt, anything else that is no list of ids, or an id outside
        the vocabulary, naming the prompt.
    """
    out = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise ValueError(f"prompt {index} is text; encode it with the model's tokenizer first")
        ids = np.asarray(prompt)
        if ids.ndim == 1 and ids.size == 0:
            raise ValueError(f"prompt {index} is empty; give it at least one token, such as bos")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"prompt {index} is not a list of token ids ({ids.dtype} of shape {ids.shape}); "
                "prompts is a list of such lists"
            )
        bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if bad.size:
            raise ValueError(
                f"prompt {index} has token id {ids[bad[0]]} at position {bad[0]}, outside the "
                f"model's vocabulary of {vocab_size}; use the model's own tokenizer"
            )
        out.append(ids.astype(np.int32))
    return out


def cache_length(lengths: Sequence[int], new_tokens: int, max_length: int | None = None) -> int:
    """How many tokens the cache must hold a lane.

    Args:
      lengths: tokens of each prompt, at least one prompt.
      new_tokens: the most tokens added to each.
      max_length: a length to keep to; None takes what is needed, rounded up by at most a quarter
        (but at least to 64), so that prompts of about the same length share compiled functions.

    Raises:
      ValueError: if `max_length` does not hold the longest prompt and its new tokens.
    """
    longest = int(np.argmax(lengths))
    needed = lengths[longest] + new_tokens
    if max_length is None:
        unit = max(64, 1 << (needed.bit_length() - 3))
        return -(-needed // unit) * unit
    if needed > max_length:
        raise ValueError(
            f"prompt {longest} has {lengths[longest]} tokens and needs, with max_new_tokens="
            f"{new_tokens}, a cache of {needed} tokens, but max_length={max_length}; raise "
            "max_length, or shorten the prompt or max_new_tokens"
        )
    return max_length


def stop_ids(eos_id: int | Sequence[int] | None, config: ModelConfig) -> Int32[np.ndarray, " n"]:
    """The ids that end a text, padded with an id that no token has.

    Args:
      eos_id: one id or several; None for those of the config, an empty sequence for none.
      config: the model's config.
    """
    if eos_id is None:
        ids = config.eos_ids
    else:
        ids = (eos_id,) if isinstance(eos_id, int | np.integer) else tuple(eos_id)
    slots = max(1, -(-len(ids) // _STOP_SLOTS)) * _STOP_SLOTS
    return np.asarray([*ids, *[-1] * (slots - len(ids))], np.int32)


def free_key(key: Any) -> jax.Array:
    """A JAX key, typed and on no device in particular; None gives `jax.random.key(0)`.

    A key that was put on a device would clash with weights that lie elsewhere.
    """
    if key is None:
        return jax.random.key(0)
    impl = None
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        impl, key = str(jax.random.key_impl(key)), jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.asarray(np.asarray(key)), impl=impl)
