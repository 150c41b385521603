"""Samples of generated text during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jet_jax.data import TextTokenizer
from jet_jax.generation import Generator
from jet_jax.prompts import check_prompts
from jet_jax.sampling import make_sampling


class TextSampler:
    """Continues fixed prompts with the weights of the moment; compiles once a run.

    Args:
      graphdef: the model's structure.
      params: its weights; only their shapes and placement matter here.
      tokenizer: the tokenizer.
      prompts: texts to continue.
      tokens: tokens to add to each.
      temperature: 0 is greedy.

    Raises:
      ValueError: for a prompt without tokens, or numbers out of their range: before a run trains,
        not when it has.
    """

    def __init__(
        self,
        graphdef: Any,
        params: PyTree,
        tokenizer: TextTokenizer,
        prompts: Sequence[str],
        *,
        tokens: int = 64,
        temperature: float = 0.0,
    ):
        if tokens < 1:
            raise ValueError(f"sample_tokens={tokens} must be at least 1.")
        self._generator = Generator(graphdef=graphdef, params=params)
        self._tokenizer = tokenizer
        self._prompts = tuple(prompts)
        self._options = {"max_new_tokens": tokens, "temperature": temperature}
        start = [tokenizer.bos_id] if tokenizer.adds_bos else []
        ids = [[*start, *(int(i) for i in tokenizer.encode(prompt))] for prompt in self._prompts]
        vocab_size = self._generator.config.vocab_size
        make_sampling(vocab_size, temperature)
        try:
            self._ids = check_prompts(ids, vocab_size)
        except ValueError as error:
            raise ValueError(f"sample_prompts: {error}") from error

    def __call__(self, params: PyTree, seed: int) -> list[str]:
        """Returns each prompt with its continuation; equal seeds give equal texts."""
        generator = self._generator.with_params(params)
        new = generator.generate(self._ids, key=jax.random.key(seed), **self._options)
        return [p + self._tokenizer.decode(n) for p, n in zip(self._prompts, new, strict=True)]
