"""Hugging Face tokenizers from a local folder: text to token ids and back, without torch."""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32


def _no_torch_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("PyTorch was not found")


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the few facts that data and generation need.

    Attributes:
      hf: the transformers tokenizer (chat templates and the like).
      vocab_size: one more than the largest id, added tokens included.
      bos_id: id of the beginning-of-sequence token, None if there is none.
      eos_id: id of the end-of-sequence token, None if there is none.
      adds_bos: whether the tokenizer by itself begins a text with `bos_id`.
    """

    hf: Any
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Returns the ids of a text and nothing around them.

        A special token spelled out in the text becomes its id, as everywhere in Hugging Face.
        """
        # Not hf(text): it sets truncation and padding on each call, and two threads collide there.
        ids = self.hf.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, np.int32)

    def decode(self, ids: Iterable, *, skip_special: bool = True) -> str:
        """Returns the text of token ids."""
        ids = [int(i) for i in ids]
        return self.hf.backend_tokenizer.decode(ids, skip_special_tokens=skip_special)


def _config(path: str) -> Any:
    """An empty config where transformers does not know the model whose folder this is.

    It reads the config.json beside a tokenizer, and fails or complains at one that is not its own.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    file = os.path.join(path, "config.json")
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as stream:
        model_type = json.load(stream).get("model_type")
    return None if model_type in CONFIG_MAPPING else PreTrainedConfig()


def load_tokenizer(path: str | os.PathLike, vocab_size: int | None = None) -> TextTokenizer:
    """Loads the tokenizer in a local folder.

    Args:
      path: folder with tokenizer.json and usually tokenizer_config.json.
      vocab_size: rows of the model's embedding, to check against; None checks nothing. A model
        with more rows than the tokenizer has ids is fine: many pad theirs.

    Raises:
      ValueError: there is no tokenizer in `path`, or it has more ids than `vocab_size`.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.isfile(os.path.join(path, "tokenizer.json")):
        raise ValueError(f"no tokenizer in {path!r}: expected a folder with a tokenizer.json")
    # transformers says on import that it found no torch, which is meant to be so here.
    logging.getLogger("transformers").addFilter(_no_torch_notice)
    from transformers import AutoTokenizer  # 2 s to import, so only where it is used

    try:
        hf = AutoTokenizer.from_pretrained(path, config=_config(path), local_files_only=True)
        backend = hf.backend_tokenizer
    except Exception as error:  # the Rust library raises bare exceptions
        raise ValueError(f"cannot load the tokenizer in {path!r}: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    bos = hf.bos_token_id
    adds_bos = bos is not None and backend.encode("a").ids[:1] == [bos]
    tokenizer = TextTokenizer(hf, size, bos, hf.eos_token_id, adds_bos)
    if vocab_size is not None:
        check_vocab(tokenizer, vocab_size, path)
    return tokenizer


def check_vocab(tokenizer: TextTokenizer, vocab_size: int, name: str = "the tokenizer") -> None:
    """Checks that every id of a tokenizer has a row in a model's embedding.

    Raises:
      ValueError: it has more ids than that.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{name} has {tokenizer.vocab_size} token ids, but the model's vocab_size is "
            f"{vocab_size}; use the model's own tokenizer or raise vocab_size"
        )
