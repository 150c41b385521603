"""Retrieval: rows whose answers stand earlier in the same row.

Every generator takes a tokenizer (two of them also a range of token ids, for models without one),
a seed, a number of rows and their length in tokens, and options that make it harder. Rows depend
on the arguments alone. `split` is "search", "tuning" or "test"; rows of two splits differ whatever
their seeds (`jet_jax.evaluation.splits`). `min_gap` is the fewest tokens between what states an
answer and the question for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import haystack, splits
from jet_jax.evaluation.haystack import encode
from jet_jax.evaluation.retrieval_text import extraction, needle, phone_book
from jet_jax.evaluation.rows import Passage, Rows, pack
from jet_jax.evaluation.words import word_ids

__all__ = ["copy", "extraction", "mqar", "needle", "phone_book"]


def mqar(
    tokens: TextTokenizer | range,
    seed: int,
    num_rows: int,
    length: int,
    *,
    num_pairs: int = 8,
    num_queries: int = 4,
    min_gap: int = 8,
    split: str = "test",
    words: Sequence[str] | None = None,
    documents: Sequence[str] | None = None,
) -> Rows:
    """Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927).

    Keys and values are stated once, at random places of a filler; then some keys come again, in
    random order, each followed by its value, which is an answer of one token. In words a pair
    reads " river is stone."; over a range it is two tokens, and filler, keys and values are the
    three thirds of the range.

    Args:
      tokens: a tokenizer, or the token ids to use.
      seed: of the random numbers.
      num_rows: rows.
      length: tokens of each, exactly.
      num_pairs: keys with a value; hard where it exceeds what a layer's state holds.
      num_queries: keys asked for in each row.
      min_gap: tokens of filler between the last pair and the first question, at least.
      split: of the items.
      words: keys and values, each one token; by default the tokenizer's own.
      documents: text for the filler, by default RULER's sentences.

    Raises:
      ValueError: a length too short for this, too few words, or more queries than pairs.
    """
    _at_least_one(mqar.__name__, num_pairs=num_pairs, num_queries=num_queries)
    if num_queries > num_pairs:
        raise ValueError(f"mqar: num_queries={num_queries} exceeds num_pairs={num_pairs}")
    if isinstance(tokens, range):
        third = len(tokens) // 3
        noise, keys, values = tokens[:third], tokens[third : 2 * third], tokens[2 * third :]
        if third < num_pairs:
            raise ValueError(
                f"mqar: a third of {tokens} holds {third} keys, fewer than num_pairs={num_pairs}; "
                "give a longer range or ask for fewer pairs"
            )
        begin, link, stop = Passage(), [], []
        filler = haystack.token_filler(noise)
    else:
        keys = values = word_ids(tokens, words, 2 * num_pairs, "mqar")
        begin = haystack.start(tokens)
        link, stop = encode(tokens, " is"), encode(tokens, ".")
        filler = haystack.text_filler(tokens, documents and splits.documents_of(documents, split))
    statement = 2 + len(link) + len(stop)
    needed = len(begin.ids) + (num_pairs + num_queries) * statement
    left = haystack.room(
        "mqar", length, needed, min_gap, f"{num_pairs} pairs, {num_queries} queries"
    )

    def make(rng: np.random.Generator) -> Passage:
        if keys is values:  # words: no value is a key of another pair
            both = rng.choice(keys, 2 * num_pairs, replace=False)
            pairs = both.reshape(num_pairs, 2).tolist()
        else:
            some = rng.choice(keys, num_pairs, replace=False).tolist()
            pairs = list(zip(some, rng.choice(values, num_pairs).tolist(), strict=True))
        statements = [[key, *link, value, *stop] for key, value in pairs]
        units = haystack.fill(filler(rng), left)
        passage = Passage(begin.ids).write(haystack.hide(rng, statements, units, min_gap))
        for i in rng.choice(num_pairs, num_queries, replace=False):
            passage.write([pairs[i][0], *link]).ask([pairs[i][1]]).write(stop)
        return passage

    return pack(splits.draw(make, seed, split, num_rows, "mqar"), length, name="mqar")


def copy(
    tokens: TextTokenizer | range,
    seed: int,
    num_rows: int,
    length: int,
    *,
    span: int = 8,
    min_gap: int = 8,
    split: str = "test",
    words: Sequence[str] | None = None,
) -> Rows:
    """Random tokens or words, and the same again (Jelassi et al. 2024, arXiv:2402.01032).

    Both halves follow a separator: two newlines, or the first id of the range. The second half is
    cut into answers of `span` tokens; what is left over is not scored.

    Args:
      tokens: a tokenizer, or the token ids to use.
      seed: of the random numbers.
      num_rows: rows.
      length: tokens of each; one may be padding.
      span: tokens of an answer.
      min_gap: fewest tokens of a half.
      split: of the items.
      words: to copy, each one token; by default the tokenizer's own.

    Raises:
      ValueError: a length too short for an answer, or fewer than two words.
    """
    _at_least_one("copy", span=span)
    if isinstance(tokens, range):
        separator, content, begin = [*tokens[:1]], list(tokens[1:]), Passage()
        if len(content) < 2:
            raise ValueError(f"copy: {tokens} is too short; three ids are needed")
    else:
        separator, begin = encode(tokens, "\n\n"), haystack.start(tokens)
        content = word_ids(tokens, words, 2, "copy")
    around = len(begin.ids) + 2 * len(separator)
    half = (length + 1 - around) // 2
    if half < max(span, min_gap):
        needed = around + 2 * max(span, min_gap) - 1
        raise ValueError(f"copy: length={length} is too short; set it to at least {needed}")

    def make(rng: np.random.Generator) -> Passage:
        text = rng.choice(content, half).tolist()
        passage = Passage(begin.ids).write([*separator, *text, *separator])
        for i in range(0, half - span + 1, span):
            passage.ask(text[i : i + span])
        return passage.write(text[half - half % span :])

    return pack(splits.draw(make, seed, split, num_rows, "copy"), length, name="copy")


def _at_least_one(name: str, **options: int) -> None:
    for option, value in options.items():
        if value < 1:
            raise ValueError(f"{name}: {option}={value} must be at least 1")
