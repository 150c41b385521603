"""Words for questions: single tokens of a tokenizer, and names of people."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer

MOST = 4096  # words taken of a large vocabulary
FIRST = """Alice Anna Arthur Brian Carol Charles Clara Daniel David Diana Edward Ellen Emma Frank
George Grace Helen Henry Irene Jack James Jane Julia Kate Laura Louis Maria Martin Nora Oscar Paul
Peter Rachel Robert Rose Samuel Sarah Simon Thomas Victor""".split()
LAST = """Adams Baker Barnes Bennett Brooks Carter Clark Cole Cooper Davis Evans Fisher Foster
Graham Gray Green Hall Harris Hill Hughes Jackson Kelly King Lewis Mason Miller Moore Morgan Murray
Nelson Palmer Parker Perry Price Reed Rogers Russell Scott Shaw Taylor Turner Walker Ward Watson
Webb West White Wood Wright Young""".split()


@functools.lru_cache(maxsize=4)
def single_token_words(tokenizer: TextTokenizer) -> dict[str, int]:
    """Lower-case words of three letters or more that are one token after a space, and their ids.

    They are in the order of their ids, which a byte-pair tokenizer gives out by frequency, and at
    most `MOST`. In a small vocabulary some are parts of words.
    """
    found: dict[str, int] = {}
    for i in range(tokenizer.vocab_size):
        word = tokenizer.decode([i]).strip()
        if re.fullmatch("[a-z]{3,}", word) and tokenizer.encode(f" {word}").tolist() == [i]:
            found[word] = i
            if len(found) == MOST:
                break
    return found


def word_ids(
    tokenizer: TextTokenizer, words: Sequence[str] | None, needed: int, name: str
) -> list[int]:
    """Ids of words, each of one token after a space; None takes the tokenizer's own words.

    Raises:
      ValueError: fewer than `needed` words, or one that the tokenizer splits.
    """
    ids = list(single_token_words(tokenizer).values()) if words is None else []
    for word in dict.fromkeys(words or ()):
        pieces = tokenizer.encode(f" {word}").tolist()
        if len(pieces) != 1:
            raise ValueError(
                f"{name}: the tokenizer splits {word!r} into {len(pieces)} tokens, but words must "
                "be one token each; leave it out, or leave words=None to take the tokenizer's own"
            )
        ids += pieces
    if len(ids) < needed:
        raise ValueError(
            f"{name}: {needed} words of one token are needed, but there are {len(ids)}; ask for "
            "less, give more words, or use a tokenizer with a larger vocabulary"
        )
    return ids


def people(rng: np.random.Generator, count: int, name: str) -> list[str]:
    """Different full names.

    Raises:
      ValueError: more of them than there are.
    """
    most = len(FIRST) * len(LAST)
    if count > most:
        raise ValueError(f"{name}: {count} names asked for, but there are {most}; ask for fewer")
    picked = rng.choice(most, count, replace=False)
    return [f"{FIRST[i // len(LAST)]} {LAST[i % len(LAST)]}" for i in picked]
