"""Samples of generated text during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from jet_jax.data import TextTokenizer
from jet_jax.generation import Generator


class TextSampler:
    """Continues fixed prompts with the weights of the moment; compiles once a run.

    Args:
      graphdef: the model's structure.
      params: its weights; only their shapes and placement matter here.
      tokenizer: the tokenizer.
      prompts: texts to continue.
      tokens: tokens to add to each.
      temperature: 0 is greedy.
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
        self._generator = Generator(graphdef=graphdef, params=params)
        self._tokenizer = tokenizer
        self._prompts = tuple(prompts)
        self._options = {"max_new_tokens": tokens, "temperature": temperature}

    def __call__(self, params: PyTree, seed: int) -> list[str]:
        """Returns each prompt with its continuation; equal seeds give equal texts."""
        ids = []
        for prompt in self._prompts:
            start = [self._tokenizer.bos_id] if self._tokenizer.adds_bos else []
            ids.append([*start, *(int(i) for i in self._tokenizer.encode(prompt))])
        generator = self._generator.with_params(params)
        new = generator.generate(ids, key=jax.random.key(seed), **self._options)
        return [p + self._tokenizer.decode(n) for p, n in zip(self._prompts, new, strict=True)]
