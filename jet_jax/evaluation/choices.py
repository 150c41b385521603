"""Multiple choice from records, and the last word of a passage from documents."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import haystack, splits
from jet_jax.evaluation.haystack import encode
from jet_jax.evaluation.rows import Passage, Rows, pack

Record = dict[str, Any]


def read_records(path: str | os.PathLike) -> list[Record]:
    """Reads `{"question": ..., "choices": [...], "answer": index from 0}` lines.

    Raises:
      ValueError: no records, or a line that is not one; the message has its number.
      OSError: the file cannot be read.
    """
    records = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{os.fspath(path)}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not valid JSON ({error})") from None
            _check(record, where)
            records.append(record)
    if not records:
        raise ValueError(f"{os.fspath(path)} holds no records")
    return records


def choice_rows(
    tokenizer: TextTokenizer,
    records: Sequence[Mapping[str, Any]],
    length: int,
    *,
    template: str = "Question: {question}\nAnswer:",
    split: str | None = None,
    name: str = "choices",
) -> Rows:
    """Makes rows of questions: each choice follows the question in a text of its own.

    A text longer than a row loses the beginning of its question, as much for each choice.

    Args:
      tokenizer: of the model.
      records: with `question`, `choices` and `answer`, the index of the right one from 0.
      length: tokens of a row, which several choices share.
      template: what stands before a space and the choice; "{question}" alone for sentences to be
        continued.
      split: "search", "tuning" or "test" for the questions of that split; None for all.
      name: of the set.

    Raises:
      ValueError: no records, a bad one, or a choice that leaves no room for a question.
    """
    if "{question}" not in template:
        raise ValueError(f"{name}: template={template!r} does not hold {{question}}")
    for number, record in enumerate(records, 1):
        _check(record, f"{name}, record {number}")
    if split is not None:
        wanted = set(splits.documents_of([r["question"] for r in records], split))
        records = [record for record in records if record["question"] in wanted]
    begin = haystack.start(tokenizer).ids
    passages, groups, right = [], [], []
    for group, record in enumerate(records):
        prompt = encode(tokenizer, template.replace("{question}", record["question"]))
        choices = [encode(tokenizer, f" {choice.strip()}") for choice in record["choices"]]
        most = length + 1 - len(begin) - max(map(len, choices))
        if most < 1:
            raise ValueError(
                f"{name}: a choice of {max(map(len, choices))} tokens leaves no room for its "
                f"question ({record['question'][:40]!r}…) in {length}; raise length"
            )
        passages += [Passage([*begin, *prompt[-most:]]).ask(choice) for choice in choices]
        groups += [group] * len(choices)
        right += [i == record["answer"] for i in range(len(choices))]
    return pack(passages, length, name=name, groups=groups, right=right)


def cloze(
    tokenizer: TextTokenizer,
    documents: Sequence[str],
    seed: int,
    num_rows: int,
    length: int,
    *,
    is_repeated: bool = False,
    min_gap: int = 8,
    split: str | None = "test",
) -> Rows:
    """Asks for the last word of a sentence, given the text before (LAMBADA, arXiv:1606.06031).

    Args:
      tokenizer: of the model.
      documents: texts, of which those of the split are used.
      seed: of the random choice.
      num_rows: questions; fewer if the texts do not hold as many.
      length: tokens of each row, exactly.
      is_repeated: only words that occur earlier in the row.
      min_gap: fewest tokens between such an occurrence and the question; a word that occurs
        nearer is not asked for.
      split: of the documents; None uses all of them.

    Raises:
      ValueError: `num_rows` below 1, no documents, or none with a sentence that ends beyond
        `length` tokens.
    """
    if num_rows < 1:
        raise ValueError(f"cloze: num_rows={num_rows} must be at least 1")
    texts = splits.documents_of(documents, split)
    begin = haystack.start(tokenizer).ids
    # A sentence's last word: at least four letters, and no name.
    places = [(t, m) for t in texts for m in re.finditer(r"(?<= )[a-z]{4,}(?=[.!?])", t)]
    passages = []
    for i in splits.random(seed, split or "test").permutation(len(places)):
        text, match = places[i]
        answer = encode(tokenizer, f" {match.group()}")
        size = length + 1 - len(begin) - len(answer)
        before = text[max(0, match.start() - 1 - 16 * max(size, 1)) : match.start() - 1]
        prompt = encode(tokenizer, before)[-max(size, 1) :]
        if size < 1 or len(prompt) < size:
            continue
        word = re.compile(rf"\b{match.group()}\b")
        if word.search(tokenizer.decode(prompt[len(prompt) - min_gap :])):
            continue
        if is_repeated and not word.search(tokenizer.decode(prompt[: len(prompt) - min_gap])):
            continue
        passages.append(Passage([*begin, *prompt]).ask(answer))
        if len(passages) == num_rows:
            break
    if not passages:
        raise ValueError(
            f"cloze: none of {len(texts)} documents has a sentence whose last word fits, beyond "
            f"{length} tokens; lower length or give longer documents"
        )
    return pack(passages, length, name="cloze")


def _check(record: Any, where: str) -> None:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
    for key in ("question", "choices", "answer"):
        if key not in record:
            keys = ", ".join(sorted(record)) or "none"
            raise ValueError(f"{where}: no key {key!r} (keys: {keys})")
    choices, answer = record["choices"], record["answer"]
    if not isinstance(record["question"], str):
        raise ValueError(f"{where}: question must be a text")
    if not isinstance(choices, Sequence) or len(choices) < 2 or isinstance(choices, str):
        raise ValueError(f"{where}: choices must list at least two texts")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(f"{where}: a choice is not a text or is empty")
    if isinstance(answer, bool) or not isinstance(answer, int | np.integer):
        raise ValueError(f"{where}: answer={answer!r} must be the index of a choice, from 0")
    if not 0 <= answer < len(choices):
        raise ValueError(f"{where}: answer={answer} is not the index of one of {len(choices)}")
