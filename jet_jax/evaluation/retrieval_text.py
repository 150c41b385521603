"""Retrieval from text: a phone book, numbers hidden in a text, and quotations.

The arguments that all of them share are those of `jet_jax.evaluation.retrieval`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import haystack, splits
from jet_jax.evaluation.haystack import encode
from jet_jax.evaluation.rows import Passage, Rows, pack
from jet_jax.evaluation.words import people, word_ids


def phone_book(
    tokenizer: TextTokenizer,
    seed: int,
    num_rows: int,
    length: int,
    *,
    num_entries: int | None = None,
    num_queries: int = 1,
    min_gap: int = 8,
    split: str = "test",
) -> Rows:
    """A list of names with numbers, then some of the names (Jelassi et al. 2024, arXiv:2402.01032).

    A line reads "Emma Clark: 4829"; the answer is the number. Rows end in padding.

    Args:
      tokenizer: of the model.
      seed: of the random numbers.
      num_rows: rows.
      length: tokens of each.
      num_entries: names in the book; None takes as many as fit.
      num_queries: names asked for.
      min_gap: fewest tokens between the entry of a name and the first question.
      split: of the items.

    Raises:
      ValueError: a length too short for the entries and queries.
    """
    if num_queries < 1 or (num_entries is not None and num_entries < num_queries):
        raise ValueError(
            f"phone_book: num_queries={num_queries} must be at least 1 and at most "
            f"num_entries={num_entries}"
        )
    begin, blank = haystack.start(tokenizer), encode(tokenizer, "\n")

    def make(rng: np.random.Generator) -> Passage:
        most = num_entries or min(length // 4, 1500)
        names = [encode(tokenizer, f"\n{n}:") for n in people(rng, most, "phone_book")]
        numbers = [encode(tokenizer, f" {n}") for n in rng.integers(1000, 10000, most)]
        sizes = np.array([len(a) + len(b) for a, b in zip(names, numbers, strict=True)])
        # The first entries are asked for, so room for them is kept before the others come.
        budget = length + 1 - len(begin.ids) - len(blank) - sizes[:num_queries].sum()
        count = most if num_entries else int((np.cumsum(sizes) <= budget).sum())
        if count <= num_queries and not num_entries or sizes[:count].sum() > budget:
            raise ValueError(
                f"phone_book: length={length} is too short for {num_entries or num_queries + 1} "
                f"entries and {num_queries} queries of about {int(sizes.mean()) + 1} tokens each; "
                "raise length or ask for fewer"
            )
        order = _ordered(rng, sizes[:count], num_queries, min_gap)
        if order is None:
            raise ValueError(
                f"phone_book: the entries do not leave min_gap={min_gap} tokens before the first "
                "query; lower it, or ask for more entries or a greater length"
            )
        passage = Passage(begin.ids)
        for i in order:
            passage.write(names[i] + numbers[i])
        passage.write(blank)
        for i in rng.permutation(num_queries):
            passage.write(names[i]).ask(numbers[i])
        return passage

    return pack(splits.draw(make, seed, split, num_rows, "phone_book"), length, name="phone_book")


def _ordered(
    rng: np.random.Generator, sizes: np.ndarray, num_first: int, min_gap: int
) -> list[int] | None:
    """A random order of entries with `min_gap` tokens after the last of the first `num_first`."""
    others = (rng.permutation(len(sizes) - num_first) + num_first).tolist()
    after = np.cumsum([0, *sizes[others[::-1]]])[::-1]
    places = np.count_nonzero(after >= min_gap)
    if not places:
        return None
    at = np.sort(rng.integers(0, places, num_first))
    return np.insert(np.array(others, int), at, rng.permutation(num_first)).tolist()


def needle(
    tokenizer: TextTokenizer,
    seed: int,
    num_rows: int,
    length: int,
    *,
    num_needles: int = 1,
    digits: int = 5,
    min_gap: int = 8,
    split: str = "test",
    documents: Sequence[str] | None = None,
) -> Rows:
    """Numbers hidden in a long text, one of which is asked for (RULER, arXiv:2404.06654).

    Args:
      tokenizer: of the model.
      seed: of the random numbers.
      num_rows: rows.
      length: tokens of each; a few may be padding.
      num_needles: sentences that give a word's number, at random places.
      digits: of a number.
      min_gap: fewest tokens of text between the last needle and the question.
      split: of the items, and of the documents.
      documents: the text, by default RULER's sentences.

    Raises:
      ValueError: a length too short for the needles, or too few words.
    """
    if num_needles < 1 or not 1 <= digits <= 18:
        raise ValueError(
            f"needle: num_needles={num_needles} must be at least 1, digits={digits} from 1 to 18"
        )
    words = word_ids(tokenizer, None, num_needles, "needle")
    begin = haystack.start(tokenizer)
    filler = haystack.text_filler(tokenizer, documents and splits.documents_of(documents, split))
    before, link = encode(tokenizer, " The number of the"), encode(tokenizer, " is")
    stop = encode(tokenizer, ".")

    def make(rng: np.random.Generator) -> Passage:
        picked = rng.choice(words, num_needles, replace=False)
        low = 10 ** (digits - 1)
        numbers = [encode(tokenizer, f" {n}") for n in rng.integers(low, 10 * low, num_needles)]
        prompts = [[*before, int(word), *link] for word in picked]
        hidden = [[*p, *n, *stop] for p, n in zip(prompts, numbers, strict=True)]
        needed = len(begin.ids) + sum(map(len, hidden)) + len(prompts[0]) + len(numbers[0])
        left = haystack.room("needle", length, needed, min_gap, f"{num_needles} needles")
        units = haystack.fill(filler(rng), left)
        order = [hidden[i] for i in rng.permutation(num_needles)]
        passage = Passage(begin.ids).write(haystack.hide(rng, order, units, min_gap))
        return passage.write(prompts[0]).ask(numbers[0])

    return pack(splits.draw(make, seed, split, num_rows, "needle"), length, name="needle")


def extraction(
    tokenizer: TextTokenizer,
    documents: Sequence[str],
    seed: int,
    num_rows: int,
    length: int,
    *,
    cue: int = 8,
    span: int = 8,
    min_gap: int = 8,
    split: str | None = "test",
) -> Rows:
    """A passage of a real text, then some words out of it, which the text says how to continue.

    Args:
      tokenizer: of the model.
      documents: texts, of which those of the split are used.
      seed: of the random numbers.
      num_rows: rows.
      length: tokens of each, exactly.
      cue: tokens repeated. They occur once in the passage and begin with a word.
      span: tokens that follow them there: the answer.
      min_gap: fewest tokens of the passage after the answer.
      split: of the documents; None uses all of them, and the rows are then split by nothing.

    Raises:
      ValueError: no documents, none long enough, or a length too short.
    """
    begin, blank = haystack.start(tokenizer), encode(tokenizer, "\n\n")
    size = length + 1 - len(begin.ids) - len(blank) - cue - span  # of the passage
    if min(cue, span) < 1 or size < cue + span + min_gap:
        needed = len(begin.ids) + len(blank) + 2 * (cue + span) + min_gap - 1
        raise ValueError(
            f"extraction: length={length} is too short for cue={cue} and span={span}, which must "
            f"be at least 1; set it to at least {needed}"
        )
    texts = [tokenizer.encode(text) for text in splits.documents_of(documents, split)]
    long = [ids for ids in texts if len(ids) >= size]
    if not long:
        raise ValueError(
            f"extraction: the longest of {len(texts)} documents has {max(map(len, texts))} tokens, "
            f"but rows of {length} quote from {size}; lower length or give longer documents"
        )
    piece = tokenizer.hf.backend_tokenizer.id_to_token

    def make(rng: np.random.Generator) -> Passage:
        for _ in range(100):
            ids = long[rng.integers(len(long))]
            first = rng.integers(len(ids) - size + 1)
            text = ids[first : first + size].tolist()
            at = int(rng.integers(size - cue - span - min_gap + 1))
            quoted = text[at : at + cue]
            found = [i for i in range(size - cue + 1) if text[i : i + cue] == quoted]
            if len(found) == 1 and piece(quoted[0]).startswith(("Ġ", "▁")):
                break
        else:
            raise ValueError(
                f"extraction: no {cue} tokens found that begin with a word and occur once in their "
                "passage; raise cue, or give documents of running text"
            )
        answer = text[at + cue : at + cue + span]
        return Passage(begin.ids).write([*text, *blank, *quoted]).ask(answer)

    passages = splits.draw(make, seed, split, num_rows, "extraction")
    return pack(passages, length, name="extraction")
