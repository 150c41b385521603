"""Generation for users: `generate`, and `Generator` for streams and repeated use.

Prompts run in lanes: each lane prefills its prompt in chunks of fixed size, decodes in blocks of
fixed length, and takes the next prompt when it is done. Prompt lengths therefore compile nothing;
what does is another number of lanes, cache length (rounded up) or chunk size, or other kinds of
sampling.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from jet_jax.config import ModelConfig
from jet_jax.decode import DeviceFunctions
from jet_jax.models.lm import HybridLM
from jet_jax.params import split
from jet_jax.prompts import cache_length, check_prompts, free_key, stop_ids
from jet_jax.sampling import make_sampling
from jet_jax.schedule import Piece, Schedule
from jet_jax.session import Session, Timing

__all__ = ["Generator", "Piece", "Timing", "generate"]

BLOCK = 16  # tokens decoded a call
MAX_LANES = 32  # lanes when the caller names no number


class Generator:
    """A model's weights and its compiled functions for generation.

    Args:
      model: the model; its weights are shared, not copied.
      graphdef: with `params`, in place of a model: what `jet_jax.params.split` returns.
      params: weights as a pure nested dict; sharded ones run on their mesh.
      lanes: prompts that run at once, by default as many as there are, at most 32. The cache
        takes about `config.cache_bytes(max_length, lanes)` bytes.
      prefill_chunk: tokens a lane prefills at once; by default 64 on a CPU and 256 elsewhere.
      block: tokens decoded a call.

    Raises:
      ValueError: for sizes below 1, or unless either a model or graphdef and params are given.
    """

    def __init__(
        self,
        model: HybridLM | None = None,
        *,
        graphdef: Any = None,
        params: Any = None,
        lanes: int | None = None,
        prefill_chunk: int | None = None,
        block: int = BLOCK,
    ):
        if (model is None) == (graphdef is None) or (graphdef is None) != (params is None):
            raise ValueError("Generator takes either a model or both graphdef and params")
        for name, value in (("lanes", lanes), ("prefill_chunk", prefill_chunk), ("block", block)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if model is None:
            config = nnx.merge(graphdef, params).config
        else:
            config = model.config
            graphdef, params = split(model)
        self.params = params
        self.lanes, self.prefill_chunk, self.block = lanes, prefill_chunk, block
        self.functions = DeviceFunctions(graphdef, config)

    @property
    def config(self) -> ModelConfig:
        """The model's config."""
        return self.functions.config

    def with_params(self, params: Any) -> Generator:
        """The same with other weights of the same shapes and shardings; compiles nothing new."""
        other = copy.copy(self)
        other.params = params
        return other

    def generate(
        self, prompts: Sequence[Any], max_new_tokens: int = 64, **options: Any
    ) -> list[list[int]]:
        """The new tokens of each prompt. Takes the options of `stream` and raises its errors."""
        out: list[list[int]] = [[] for _ in prompts]
        for piece in self.stream(prompts, max_new_tokens, **options):
            out[piece.request] += piece.tokens
        return out

    def stream(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_id: int | Sequence[int] | None = None,
        key: Any = None,
        max_length: int | None = None,
        timing: Timing | None = None,
    ) -> Iterator[Piece]:
        """Gives each prompt's new tokens as blocks of them complete.

        Args:
          prompts: lists or 1-d arrays of token ids, of any lengths.
          max_new_tokens: the most tokens to add to each.
          temperature: 0 takes the likeliest token; see `jet_jax.sampling` for these three.
          top_k: sample among the k likeliest tokens.
          top_p: sample among the likeliest tokens that hold this probability.
          eos_id: token ids that end a text; None takes the model's own, () none. The ending token
            is not returned, so a text is shorter than `max_new_tokens` exactly if it ended.
          key: JAX key of the random numbers, by default `jax.random.key(0)`. A prompt's tokens
            depend on the key, its index and its text, not on the other prompts or the lanes.
          max_length: tokens that the cache holds a lane; by default what the longest prompt and
            `max_new_tokens` need, rounded up.
          timing: filled in if given. Functions are then compiled before anything is timed, and
            prefill and decoding do not overlap.

        Returns:
          An iterator of `Piece(request, tokens, is_last)`, the pieces of a request in order.

        Raises:
          ValueError: for an empty prompt, an id outside the vocabulary, prompts that the cache
            does not hold, or parameters out of their range. The call raises it, not the iterator.
        """
        sampling = make_sampling(self.config.vocab_size, temperature, top_k, top_p)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        arrays = check_prompts(prompts, self.config.vocab_size)
        if not arrays:
            return iter(())
        session = Session(
            functions=self.functions,
            params=self.params,
            schedule=Schedule(arrays, self.lanes or min(len(arrays), MAX_LANES), max_new_tokens),
            max_length=cache_length([len(ids) for ids in arrays], max_new_tokens, max_length),
            chunk=self.prefill_chunk or _default_chunk(self.params),
            block=self.block,
            key=free_key(key),
            sampling=sampling,
            stop_ids=stop_ids(eos_id, self.config),
            timing=timing,
        )
        return session.run()


def _default_chunk(params: Any) -> int:
    """A CPU gains little from long chunks and pays for their padding."""
    device = next(iter(jax.tree.leaves(params)[0].devices()))
    return 64 if device.platform == "cpu" else 256


# Compiled functions only: weights kept here would outlive an update of the model's.
_functions: weakref.WeakKeyDictionary[HybridLM, DeviceFunctions] = weakref.WeakKeyDictionary()


def generate(
    model: HybridLM,
    prompts: Sequence[Any],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | Sequence[int] | None = None,
    key: Any = None,
    *,
    max_length: int | None = None,
    lanes: int | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continues prompts.

    Compiled functions are kept as long as the model lives; its weights and structure may change
    between calls.

    Args:
      model: a `HybridLM`.
      prompts: lists or 1-d arrays of token ids, of any lengths.
      max_new_tokens: the most tokens to add to each.
      temperature: 0 takes the likeliest token; see `jet_jax.sampling` for these three.
      top_k: sample among the k likeliest tokens.
      top_p: sample among the likeliest tokens that hold this probability.
      eos_id: token ids that end a text; None takes the model's own, () none.
      key: JAX key of the random numbers, by default `jax.random.key(0)`.
      max_length: tokens that the cache holds a lane; see `Generator.stream`.
      lanes: prompts that run at once; see `Generator`.
      prefill_chunk: tokens a lane prefills at once; see `Generator`.

    Returns:
      The new tokens of each prompt, without the token that ended it.

    Raises:
      ValueError: see `Generator.stream`.
    """
    generator = Generator(model, lanes=lanes, prefill_chunk=prefill_chunk)
    known = _functions.get(model)
    if known is not None and known.graphdef == generator.functions.graphdef:
        generator.functions = known
    else:
        _functions[model] = generator.functions
    return generator.generate(
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_id=eos_id,
        key=key,
        max_length=max_length,
    )
