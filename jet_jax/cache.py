"""What decoding keeps: one state dataclass a kind of layer, of fixed shape.

States are values: a mixer returns a new one and never changes the old; the caller donates.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jet_jax.config import ModelConfig
from jet_jax.mixer_options import AttentionOptions
from jet_jax.recurrent_options import RecurrentOptions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVState:
    """Keys (after rotary embedding) and values of full attention, left-aligned.

    `k`, `v`: [B, S, N, d]; slot i holds token i of the sequence.
    """

    k: Any
    v: Any

    @classmethod
    def init(
        cls,
        options: AttentionOptions,
        hidden_size: int,
        batch: int,
        max_length: int,
        dtype: Any,
        state_dtype: Any,
    ) -> KVState:
        """Zeros for `batch` sequences of at most `max_length` tokens."""
        shape = (batch, max_length, options.num_kv_heads, options.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowState:
    """Keys and values of the last w tokens: [B, w, N, d]; token i lies in slot i mod w."""

    k: Any
    v: Any

    @classmethod
    def init(
        cls,
        options: AttentionOptions,
        hidden_size: int,
        batch: int,
        max_length: int,
        dtype: Any,
        state_dtype: Any,
    ) -> WindowState:
        """Zeros for `batch` sequences, whatever their length."""
        assert options.window_size is not None
        shape = (batch, options.window_size, options.num_kv_heads, options.head_dim)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecurrentState:
    """The memory of a recurrent mixer.

    `rows`: what convolutions and token shift look back on, by name: the last raw rows
    [B, rows, width], oldest first. `recurrent`: the matrix of each head [B, H, K, V] in the
    config's state_dtype.
    """

    rows: dict[str, Any]
    recurrent: Any

    @classmethod
    def init(
        cls,
        options: RecurrentOptions,
        hidden_size: int,
        batch: int,
        max_length: int,
        dtype: Any,
        state_dtype: Any,
    ) -> RecurrentState:
        """Zeros for `batch` sequences, whatever their length."""
        tails = options.tails(hidden_size)
        rows = {name: jnp.zeros((batch, *shape), dtype) for name, shape in tails.items()}
        return cls(rows, jnp.zeros((batch, *options.state_shape(hidden_size)), state_dtype))


STATES: dict[str, Any] = {
    "attn": KVState,
    "swa": WindowState,
    "jet": RecurrentState,
    "retnet": RecurrentState,
    "gla": RecurrentState,
    "deltanet": RecurrentState,
    "gdn": RecurrentState,
    "mamba2": RecurrentState,
    "rwkv7": RecurrentState,
    "kda": RecurrentState,
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The states of all layers and `length` [B] int32, the real tokens each row has seen.

    Only the model advances `length`.
    """

    layers: tuple[Any, ...]
    length: Any


def init_cache(config: ModelConfig, batch: int, max_length: int) -> Cache:
    """An empty cache for `batch` sequences of at most `max_length` tokens.

    Keys, values and convolution rows take the config's `dtype`, recurrent states its
    `state_dtype`. `config.cache_bytes(max_length, batch)` tells its size beforehand.
    """
    layers = tuple(
        STATES[kind].init(
            config.options(kind),
            config.hidden_size,
            batch,
            max_length,
            jnp.dtype(config.dtype),
            jnp.dtype(config.state_dtype),
        )
        for kind in config.layer_types
    )
    return Cache(layers, jnp.zeros((batch,), jnp.int32))


def max_length(cache: Cache) -> int | None:
    """The most tokens a row can hold, None when no layer sets a limit."""
    sizes = [state.k.shape[1] for state in cache.layers if isinstance(state, KVState)]
    return min(sizes) if sizes else None
