"""Documents as rows: every token is scored, and a document is an item."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import haystack, splits
from jet_jax.evaluation.rows import Passage, Rows, pack


def perplexity_rows(
    tokenizer: TextTokenizer,
    documents: Sequence[str],
    length: int,
    *,
    split: str | None = None,
    name: str = "documents",
) -> Rows:
    """Cuts documents into windows of `length` tokens and packs them.

    Each token is predicted once but the first of a document; a window sees nothing of the one
    before it. `item_sums` gives a document's log-probability and number of tokens, which
    `jet_jax.evaluation.statistics.bootstrap` takes.

    Args:
      tokenizer: of the model.
      documents: texts; those of fewer than two tokens are left out.
      length: tokens of a row, and the most context a token gets.
      split: "search", "tuning" or "test" for the documents of that split; None for all.
      name: of the set.

    Raises:
      ValueError: no documents, or none of two tokens.
    """
    if length < 1:
        raise ValueError(f"{name}: length={length} must be at least 1")
    begin = haystack.start(tokenizer).ids
    windows, owners, count = [], [0], 0
    for text in splits.documents_of(documents, split):
        ids = [*begin, *tokenizer.encode(text).tolist()]
        starts = range(0, len(ids) - 1, length)
        windows += [Passage(ids[i : i + 1]).ask(ids[i + 1 : i + length + 1]) for i in starts]
        count += len(ids) > 1
        owners += [count] * len(starts)
    if not count:
        raise ValueError(f"{name}: no document has two tokens; give longer texts")
    rows = pack(windows, length, name=name)
    return dataclasses.replace(
        rows,
        answers=np.asarray(owners, np.int32)[rows.answers],
        groups=np.arange(count, dtype=np.int32),
        right=np.ones(count, bool),
    )
