"""The hybrid language model: embedding, layers, final norm, head."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jet_jax.cache import Cache, max_length
from jet_jax.config import ModelConfig
from jet_jax.mixers.context import Context, Place
from jet_jax.models.block import Block
from jet_jax.models.linear import linear, precision
from jet_jax.models.norm import RMSNorm
from jet_jax.models.remat import remat
from jet_jax.sharding import constrain
from kernels_pallas import segment_positions, validate_segment_ids

COLLECTABLE = ("hidden_states", "mixer_outputs")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """What a forward pass returns.

    Attributes:
      logits: float32, [B, T, E], or [B, E] when `logits_at` picks one position a row, or None.
      hidden: [B, T, D] after the final norm.
      features: `{"hidden_states": L+1 arrays [B, T, D], "mixer_outputs": L arrays}` as asked for.
        Hidden states are the input of layer 0, the outputs of layers 0 … L-2, and `hidden`.
      cache: the new cache, None when none was given.
    """

    logits: Any
    hidden: Any
    features: dict[str, tuple[Any, ...]]
    cache: Any


class HybridLM(nnx.Module):
    """A decoder whose layers mix by `config.layer_types`; weights named as in Hugging Face.

    `remat` names what each layer keeps for its backward pass (`jet_jax.models.remat`).
    `scan_layers` makes a forward pass without a cache loop on the device over each run of equal
    layers, whose weights it stacks: a fraction of the compile time, for one more copy of the
    weights in the compute dtype, which a training step makes anyway.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, param_dtype: Any = jnp.float32):
        self.config = config
        self.remat = "none"
        self.scan_layers = False
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            dtype=jnp.dtype(config.dtype),
            param_dtype=param_dtype,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.layers = nnx.List(
            [
                Block(
                    config,
                    kind,
                    rngs=rngs,
                    param_dtype=param_dtype,
                    place=Place(i, config.is_first(i)),
                )
                for i, kind in enumerate(config.layer_types)
            ]
        )
        self.norm = RMSNorm(
            config.hidden_size,
            config.rms_norm_eps,
            offset=config.norm_offset,
            param_dtype=param_dtype,
        )
        if not config.tie_word_embeddings:
            self.lm_head = linear(
                config.hidden_size,
                config.vocab_size,
                dtype=config.dtype,
                param_dtype=param_dtype,
                stddev=config.initializer_range,
                rngs=rngs,
            )

    def head_kernel(self) -> Float[Array, "D E"]:
        """The head's matrix; the transposed embedding when tied."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def head(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
        """Float32 logits of normalised hidden states."""
        dtype = jnp.dtype(self.config.dtype)
        return jnp.dot(
            hidden.astype(dtype),
            self.head_kernel().astype(dtype),
            precision=precision(dtype),
            preferred_element_type=jnp.float32,
        )

    def __call__(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T E"]:
        """Float32 logits of every position: `forward(tokens, segment_ids=...).logits`.

        Outside of jit the values are checked too.

        Raises:
          ValueError: for token ids outside the vocabulary or segment ids that recur in a row.
        """
        if _is_known(tokens):
            ids = np.asarray(tokens)
            low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"tokens holds ids from {low} to {high}, but the vocabulary has "
                    f"{self.config.vocab_size}"
                )
        if segment_ids is not None and _is_known(segment_ids):
            validate_segment_ids(np.asarray(segment_ids))
        return self.forward(tokens, segment_ids=segment_ids).logits

    def forward(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
        logits_at: Any = None,
        collect: Sequence[str] = (),
    ) -> Output:
        """Runs the model.

        Args:
          tokens: ids below the vocabulary size.
          segment_ids: packed or padded rows. A segment is a maximal run of one non-zero id, and an
            id does not recur in a row; 0 is padding. None means that every token is real and each
            row one sequence. With a cache there is one sequence a row, which the tokens continue.
          positions: token positions; by default they count the real tokens of each sequence
            from 0. Not to be given with a cache.
          cache: continues the cached sequences: T = 1 decodes, T > 1 prefills a chunk. The caller
            sees to it that they fit: what goes beyond the cache's length is lost.
          logits_at: None for all positions; "last" for each row's last real token; an int [B]
            array of positions in the row; "none" to skip the head.
          collect: names of intermediate results to return, of `COLLECTABLE`.

        Returns:
          An `Output`.

        Raises:
          ValueError: for shapes or names that do not fit.
        """
        self._check(tokens, segment_ids, positions, cache, logits_at, collect)
        length = tokens.shape[1]
        shift = None
        if cache is not None and segment_ids is not None and length > 1:
            # Mixers expect a chunk's padding at its end: rows padded on the left move over.
            shift = jnp.argmax(segment_ids != 0, axis=1)
            tokens, segment_ids = _roll(tokens, shift), _roll(segment_ids, shift)
        real = jnp.ones_like(tokens) if segment_ids is None else (segment_ids != 0).astype("int32")
        if positions is None:
            if cache is not None:
                positions = cache.length[:, None] + jnp.cumsum(real, axis=1) - 1
            elif segment_ids is not None:
                positions = segment_positions(segment_ids)
            else:
                positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        ctx = Context(segment_ids, positions, None if cache is None else cache.length)

        # Rows are looked up in the table's own dtype, so that its gradient is summed in it.
        x = jnp.take(self.embed_tokens.embedding[...], tokens, axis=0)
        x = x.astype(jnp.dtype(self.config.dtype))
        if self.config.embedding_scale:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        x = constrain(x, "btd")
        hidden_states, mixer_outputs, states = [x], [], []
        for run in self._runs(cache is None):
            if len(run) > 1:
                x, ctx, outputs, mixed = self._scan(run, x, ctx, bool(collect))
                hidden_states += outputs
                mixer_outputs += mixed
                continue
            state = None if cache is None else cache.layers[run[0]]
            with jax.named_scope(f"layer_{run[0]}"):
                apply = remat(_apply, self.remat)
                x, mixed, state, shared = apply(self.layers[run[0]], x, ctx, state)
            ctx = dataclasses.replace(ctx, shared=shared)
            hidden_states.append(x)
            mixer_outputs.append(mixed)
            states.append(state)
        hidden = self.norm(x)
        hidden_states[-1] = hidden
        available = {"hidden_states": hidden_states, "mixer_outputs": mixer_outputs}
        features = {name: tuple(available[name]) for name in collect}
        if cache is not None:
            cache = Cache(tuple(states), cache.length + jnp.sum(real, axis=1, dtype=jnp.int32))
        if shift is not None:
            hidden = _roll(hidden, -shift)
            real = _roll(real, -shift)
            features = {k: tuple(_roll(f, -shift) for f in v) for k, v in features.items()}
        return Output(self._logits(hidden, real, logits_at), hidden, features, cache)

    def _runs(self, scannable: bool) -> list[list[int]]:
        """Layer indices, grouped where neighbours have equal structure and may be scanned."""
        runs = [[0]]
        structures = [nnx.graphdef(layer) for layer in self.layers] if self.scan_layers else []
        for i in range(1, len(self.layers)):
            if scannable and self.scan_layers and structures[i] == structures[i - 1]:
                runs[-1].append(i)
            else:
                runs.append([i])
        return runs

    def _scan(
        self, run: list[int], x: Array, ctx: Context, collect: bool
    ) -> tuple[Array, Context, list[Array], list[Array]]:
        """Equal layers as one loop; also their outputs and their mixers' where asked for."""
        graphdef = nnx.graphdef(self.layers[run[0]])
        weights = [nnx.to_pure_dict(nnx.state(self.layers[i])) for i in run]
        stacked = jax.tree.map(lambda *w: jnp.stack(w), *weights)
        apply = remat(_apply, self.remat, in_scan=True)

        def body(carry, weights):
            x, shared = carry
            layer = nnx.merge(graphdef, weights)
            x, mixed, _, shared = apply(layer, x, dataclasses.replace(ctx, shared=shared), None)
            return (x, shared), (x, mixed) if collect else None

        with jax.named_scope(f"layers_{run[0]}_{run[-1]}"):
            (x, shared), outputs = jax.lax.scan(body, (x, ctx.shared), stacked)
        ctx = dataclasses.replace(ctx, shared=shared)
        outputs, mixed = ([], []) if outputs is None else map(list, outputs)
        return x, ctx, outputs, mixed

    def _logits(self, hidden: Array, real: Array, logits_at: Any) -> Array | None:
        if isinstance(logits_at, str) and logits_at == "none":
            return None
        if logits_at is None:
            return constrain(self.head(hidden), "bte")
        if isinstance(logits_at, str):
            logits_at = jnp.max(jnp.arange(real.shape[1]) * real, axis=1)
        picked = jnp.take_along_axis(hidden, jnp.asarray(logits_at)[:, None, None], axis=1)[:, 0]
        return self.head(picked)

    def _check(self, tokens, segment_ids, positions, cache, logits_at, collect) -> None:
        if tokens.ndim != 2:
            raise ValueError(f"tokens has shape {tokens.shape}; expected [B, T], a row a sequence")
        for name, array in (("segment_ids", segment_ids), ("positions", positions)):
            if array is not None and array.shape != tokens.shape:
                raise ValueError(f"{name} has shape {array.shape}, but tokens has {tokens.shape}")
        if cache is not None:
            if positions is not None:
                raise ValueError("positions follow from the cache; give one or the other")
            if len(cache.layers) != len(self.layers) or cache.length.shape != tokens.shape[:1]:
                raise ValueError(
                    f"the cache has {len(cache.layers)} layers and {cache.length.shape[0]} rows, "
                    f"but the model has {len(self.layers)} layers and tokens {tokens.shape[0]} rows"
                )
            room, length = max_length(cache), tokens.shape[1]
            if segment_ids is None and room is not None and length > room:
                raise ValueError(f"{length} tokens do not fit in a cache of {room} a row")
        if isinstance(logits_at, str) and logits_at not in ("last", "none"):
            raise ValueError(f"logits_at={logits_at!r}: use None, 'last', 'none' or indices [B]")
        for name in collect:
            if name not in COLLECTABLE:
                raise ValueError(f"collect: unknown {name!r}; known: {', '.join(COLLECTABLE)}")


def _apply(layer: Block, x: Array, ctx: Context, state: Any) -> tuple[Any, ...]:
    """One layer as a function, for remat."""
    return layer(x, ctx, state)


def _is_known(x: Array) -> bool:
    """Whether this process can look at the values now."""
    return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)


def _roll(x: Array, shift: Int[Array, " B"]) -> Array:
    """Moves each row's columns left by `shift[b]`, round the end."""
    length = x.shape[1]
    index = (jnp.arange(length) + shift[:, None]) % length
    return jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)
