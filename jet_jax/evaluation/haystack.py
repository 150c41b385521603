"""Filler text of an exact number of tokens, and statements hidden in it.

Filler comes in units that are not cut: sentences, or single tokens where there is no tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation.rows import Passage

Ids = list[int]
# The filler of RULER (arXiv:2404.06654), which says nothing.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def start(tokenizer: TextTokenizer) -> Passage:
    """A passage that begins as the tokenizer begins a text."""
    if tokenizer.adds_bos and tokenizer.bos_id is not None:
        return Passage([tokenizer.bos_id])
    return Passage()


def encode(tokenizer: TextTokenizer, text: str) -> Ids:
    """Token ids of a text as a list."""
    return tokenizer.encode(text).tolist()


def token_filler(tokens: Sequence[int]) -> Callable[[np.random.Generator], Iterator[Ids]]:
    """Filler of single random tokens."""

    def stream(rng: np.random.Generator) -> Iterator[Ids]:
        while True:
            yield [tokens[int(rng.integers(len(tokens)))]]

    return stream


def text_filler(
    tokenizer: TextTokenizer, documents: Sequence[str] | None
) -> Callable[[np.random.Generator], Iterator[Ids]]:
    """Filler of the sentences of documents, in order from a random one; None for `NOISE`.

    Raises:
      ValueError: the documents hold no text.
    """
    texts = [NOISE] if documents is None else documents
    sentences = [s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if s.strip()]
    if not sentences:
        raise ValueError("the documents for the filler hold no text")
    units: dict[int, Ids] = {}  # encoded when first used

    def stream(rng: np.random.Generator) -> Iterator[Ids]:
        at = int(rng.integers(len(sentences)))
        while True:
            if at not in units:
                units[at] = encode(tokenizer, " " + sentences[at].strip())
            yield units[at]
            at = (at + 1) % len(sentences)

    return stream


def fill(units: Iterator[Ids], count: int) -> list[Ids]:
    """Takes units of `count` tokens in all; the first one is the end of a unit that did not fit."""
    found: list[Ids] = []
    while count:
        unit = next(units)
        if len(unit) > count:
            return [unit[-count:], *found]
        found.append(unit)
        count -= len(unit)
    return found


def hide(
    rng: np.random.Generator, statements: Sequence[Ids], filler: Sequence[Ids], min_gap: int
) -> Ids:
    """Puts statements, in order, at random places between units of filler.

    At least `min_gap` tokens of filler follow the last one; the filler must hold as many.
    """
    after = np.cumsum([0, *(len(unit) for unit in reversed(filler))])[::-1]  # from unit i on
    places = np.sort(rng.integers(0, np.count_nonzero(after >= min_gap), len(statements)))
    out: Ids = []
    for i in range(len(filler) + 1):
        for j in np.flatnonzero(places == i):
            out += statements[int(j)]
        if i < len(filler):
            out += filler[i]
    return out


def room(name: str, length: int, needed: int, min_gap: int, what: str) -> int:
    """Tokens left for filler in a row of `length` tokens, `needed` of length + 1 being taken.

    Raises:
      ValueError: fewer than `min_gap` are left.
    """
    left = length + 1 - needed
    if left < min_gap:
        raise ValueError(
            f"{name}: length={length} is too short for {what} and a gap of {min_gap} tokens; set "
            f"length to at least {needed + min_gap - 1} or ask for less"
        )
    return left
