"""Between text and prompts: a model's tokenizer, its chat template and the ids that end a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jet_jax.config import ModelConfig
from jet_jax.data.tokenizer import TextTokenizer, load_tokenizer
from jet_jax.io import tokenizer_dir


def find_tokenizer(model: str, tokenizer: str | None = None) -> Path:
    """The directory with a model's tokenizer.

    Args:
      model: a model directory, as for `jet_jax.load`.
      tokenizer: the tokenizer's directory, where the model has none of its own.

    Raises:
      ValueError: there is none.
    """
    if tokenizer is not None:
        return Path(tokenizer)
    found = tokenizer_dir(model)
    if found is None:
        raise ValueError(f"{model} has no tokenizer; name a directory that has: --tokenizer DIR")
    return found


def load_matching(where: Path, config: ModelConfig) -> TextTokenizer:
    """Loads a tokenizer. Raises ValueError if it has ids that the model has no embedding for."""
    try:
        return load_tokenizer(where, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{error}; --tokenizer DIR takes another one") from error


def encode(tokenizer: TextTokenizer, text: str, chat: bool = False) -> list[int]:
    """The token ids of a prompt.

    Args:
      tokenizer: the model's.
      text: the prompt; special tokens spelled out in it become their ids.
      chat: makes it the user's turn of a conversation that the model is to answer.

    Returns:
      The ids, begun with bos where the tokenizer does so by itself.

    Raises:
      ValueError: no token comes out, or there is no chat template.
    """
    if chat:
        if not tokenizer.hf.chat_template:
            raise ValueError("the tokenizer has no chat template; leave out --chat")
        try:
            text = tokenizer.hf.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
        except ImportError as error:
            raise ValueError("chat templates need the package jinja2; install it") from error
    ids = tokenizer.encode(text).tolist()
    if tokenizer.adds_bos and ids[:1] != [tokenizer.bos_id]:  # a template may have written it
        ids = [tokenizer.bos_id, *ids]
    if not ids:
        raise ValueError("the prompt is empty and the tokenizer adds no bos; give some text")
    return ids


def ending_ids(where: Path, tokenizer: TextTokenizer, config: ModelConfig) -> Sequence[int]:
    """The ids that end a text: those of model, tokenizer and generation_config.json together.

    Chat models often name the end of a turn in generation_config.json only.
    """
    ids = set(config.eos_ids)
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    path = where / "generation_config.json"
    if path.is_file():
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(named) if isinstance(named, list) else set() if named is None else {named}
    return sorted(ids)
