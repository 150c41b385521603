"""Text that a model writes by itself, as continuations of the beginnings of documents.

A teacher's own samples at temperature 1 are text that it is sure to know, without end: little text
of one's own then suffices to distil from it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Int

from jet_jax.data.sources import TextSource
from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.generation import Generator
from jet_jax.prompts import cache_length

GROUP = 512  # rows that share a key; a run that was stopped does its last group again
# Only a document's beginning is tokenised, more than its head ever needs.
CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True)
class Continuations:
    """What is written.

    Attributes:
      tokens: length of a row, its head included, unless the model ends the text before.
      head: the least and the most tokens that are taken from a document.
      temperature: of the sampling; 1 is the model's own distribution.
      seed: of documents, lengths of heads and samples.
    """

    tokens: int = 1024
    head: tuple[int, int] = (8, 32)
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        low, high = self.head
        if not 1 <= low <= high:
            raise ValueError(f"head={low}-{high}: give the least and the most tokens, from 1 on")
        if self.tokens <= high:
            raise ValueError(f"tokens={self.tokens} leaves nothing to write after a head of {high}")


def document_head(
    wanted: Continuations, row: int, documents: TextSource | Sequence[str], tokenizer: TextTokenizer
) -> list[int]:
    """The beginning that a row continues.

    All documents come once, in random order, before any comes again.

    Args:
      wanted: what is written.
      row: its number.
      documents: texts.
      tokenizer: the model's.

    Returns:
      Token ids, begun with bos where the tokenizer does so; all of a document that is shorter.
    """
    round_, place = divmod(row, len(documents))
    order = _order(wanted.seed, round_, len(documents))
    low, high = wanted.head
    length = int(np.random.default_rng((wanted.seed, 1, row)).integers(low, high + 1))
    text = documents[int(order[place])][: high * CHARACTERS_PER_TOKEN]
    ids = tokenizer.encode(text).tolist()[:length]
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    return ids if bos is None else [bos, *ids]


def write_texts(
    generator: Generator,
    tokenizer: TextTokenizer,
    documents: TextSource | Sequence[str],
    wanted: Continuations,
    rows: int,
    *,
    done: int = 0,
    end_ids: Sequence[int] = (),
) -> Iterator[str]:
    """Yields the texts of rows `done` to `rows - 1`, in order.

    A row's text follows from the settings and its number alone, for one number of lanes: another
    rounds differently. Rows of a group that is begun are computed again, so that this holds.

    Args:
      generator: the model.
      tokenizer: its tokenizer.
      documents: texts whose beginnings are continued.
      wanted: what is written.
      rows: number of rows in all.
      done: rows that are there already.
      end_ids: ids that end a text.
    """
    # The new tokens are as many for each row; what is too long for it is cut off below.
    new_tokens = wanted.tokens - wanted.head[0]
    room = cache_length([wanted.head[1] + 1], new_tokens)
    if done >= rows:
        return
    for first in range(done // GROUP * GROUP, rows, GROUP):
        numbers = range(first, min(first + GROUP, rows))
        heads = [document_head(wanted, row, documents, tokenizer) for row in numbers]
        texts = [list(head) for head in heads]
        finished: dict[int, bool] = {}
        written = 0
        key = jax.random.fold_in(jax.random.key(wanted.seed), first // GROUP)
        for piece in generator.stream(
            heads,
            new_tokens,
            temperature=wanted.temperature,
            eos_id=end_ids,
            key=key,
            max_length=room,
        ):
            texts[piece.request] += piece.tokens
            finished[piece.request] = piece.is_last
            while finished.get(written):
                if first + written >= done:
                    ids = texts[written][: wanted.tokens]
                    yield tokenizer.decode(ids, skip_special=True)
                written += 1


@functools.lru_cache(maxsize=2)
def _order(seed: int, round_: int, count: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng((seed, 0, round_)).permutation(count)
