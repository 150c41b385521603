"""The built-in tasks by name, with the sizes that are used unless a caller names others."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from jet_jax.data.sources import TextSource
from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import retrieval
from jet_jax.evaluation.arithmetic import arithmetic
from jet_jax.evaluation.choices import choice_rows, cloze, read_records
from jet_jax.evaluation.documents import perplexity_rows
from jet_jax.evaluation.rows import Rows

TEXTS = 128  # texts of a generated task
TEMPLATE = "Question: {question}\nAnswer:"


@dataclass(frozen=True)
class Settings:
    """What a caller may say about a task.

    Attributes:
      length: tokens of a row; None takes the task's own.
      items: texts of a generated task, questions of a choice set, or documents; None takes
        `TEXTS`, or all questions or documents.
      seed: of generated texts.
      split: "search", "tuning" or "test". None takes "test" for what is generated, and all
        documents and questions.
      documents: texts that some tasks need and others take as filler.
      template: of the questions of choice sets, as in `choice_rows`.
    """

    length: int | None = None
    items: int | None = None
    seed: int = 0
    split: str | None = None
    documents: tuple[str, ...] = ()
    template: str = TEMPLATE


class Task(NamedTuple):
    """A task.

    Attributes:
      about: one line.
      make: makes the rows; its settings have a length.
      length: tokens of a row by default.
      measure: the main figure: "accuracy", or "nll" in nats a token.
      needs_documents: whether it is nothing without documents.
    """

    about: str
    make: Callable[[TextTokenizer, Settings], Rows]
    length: int
    measure: Literal["accuracy", "nll"] = "accuracy"
    needs_documents: bool = False

    def rows(self, tokenizer: TextTokenizer, settings: Settings) -> Rows:
        """The rows of the task. Raises ValueError for a length, split or text that does not fit."""
        return self.make(tokenizer, replace(settings, length=settings.length or self.length))


def _generated(function: Callable[..., Rows], has_filler: bool = False, **options: Any):
    """A generator of `retrieval` or `arithmetic` as a task's `make`."""

    def make(tokenizer: TextTokenizer, s: Settings) -> Rows:
        documents = {}
        if has_filler and s.documents:
            # Without a split all documents serve; paragraphs, since the generators choose by split.
            texts = s.documents if s.split else [p for d in s.documents for p in d.split("\n\n")]
            documents = {"documents": texts}
        size = s.items or TEXTS
        return function(
            tokenizer, s.seed, size, _length(s), split=s.split or "test", **documents, **options
        )

    return make


def _quoted(function: Callable[..., Rows]):
    """A generator that asks about documents as a task's `make`."""

    def make(tokenizer: TextTokenizer, s: Settings) -> Rows:
        return function(tokenizer, s.documents, s.seed, s.items or TEXTS, _length(s), split=s.split)

    return make


def _perplexity(tokenizer: TextTokenizer, s: Settings, name: str = "perplexity") -> Rows:
    documents = s.documents[: s.items]
    return perplexity_rows(tokenizer, documents, _length(s), split=s.split, name=name)


TASKS: dict[str, Task] = {
    "mqar": Task(
        "which word belongs to which: 8 pairs stated once, 4 asked for",
        _generated(retrieval.mqar, True),
        512,
    ),
    "phone_book": Task(
        "the number of a name in a list as long as the row", _generated(retrieval.phone_book), 512
    ),
    "needle": Task(
        "a number hidden in filler, or in --documents", _generated(retrieval.needle, True), 1024
    ),
    "copy": Task("random words, and the same again", _generated(retrieval.copy), 256),
    "extraction": Task(
        "8 tokens quoted from a passage of --documents: what follows them there",
        _quoted(retrieval.extraction),
        512,
        needs_documents=True,
    ),
    "addition": Task("sums of two-digit numbers after 4 examples", _generated(arithmetic), 256),
    "subtraction": Task(
        "the same with differences", _generated(arithmetic, kind="subtraction"), 256
    ),
    "chain": Task(
        "the same with four numbers, as 7 + 5 - 3 + 9", _generated(arithmetic, kind="chain"), 256
    ),
    "cloze": Task(
        "the last word of a sentence of --documents", _quoted(cloze), 256, needs_documents=True
    ),
    "perplexity": Task(
        "every token of --documents, by how much text precedes it",
        _perplexity,
        1024,
        "nll",
        needs_documents=True,
    ),
}


def find(names: Sequence[str]) -> dict[str, Task]:
    """Tasks by name; a path that ends in .jsonl is a set of questions or of texts.

    Raises:
      ValueError: an unknown name, with the nearest known one, or a file that holds neither.
      OSError: a file cannot be read.
    """
    found = {}
    for name in names:
        if name in TASKS:
            found[name] = TASKS[name]
        elif name.endswith(".jsonl"):
            found[name] = from_file(name)
        else:
            near = difflib.get_close_matches(name, TASKS, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ";"
            raise ValueError(
                f"unknown task {name!r}{hint} known are {', '.join(TASKS)}, a path to a .jsonl "
                "file, lm:NAME and paper:GROUP (--list tells more)"
            )
    return found


def from_file(path: str) -> Task:
    """The questions with choices, or else the texts, of a .jsonl file as a task.

    Raises:
      ValueError: the file holds neither; the message has the line.
      OSError: the file cannot be read.
    """
    name = os.path.splitext(os.path.basename(path))[0]
    if _has_texts(path):
        texts = read_documents([path])

        def score(tokenizer: TextTokenizer, s: Settings) -> Rows:
            return _perplexity(tokenizer, replace(s, documents=texts), name)

        return Task(f"texts of {path}", score, TASKS["perplexity"].length, "nll")
    records = read_records(path)

    def choose(tokenizer: TextTokenizer, s: Settings) -> Rows:
        some = records[: s.items]
        return choice_rows(
            tokenizer, some, _length(s), template=s.template, split=s.split, name=name
        )

    return Task(f"questions of {path}", choose, 512)


def read_documents(patterns: Sequence[str]) -> tuple[str, ...]:
    """The documents of text files, as `TextSource` finds them, and raises its errors."""
    source = TextSource(patterns)
    return tuple(source[i] for i in range(len(source)))


def _has_texts(path: str) -> bool:
    """Whether the first line that is not empty is a text; what is no JSON fails later."""
    with open(path, encoding="utf-8") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        record = json.loads(first)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and "text" in record and "question" not in record


def _length(settings: Settings) -> int:
    assert settings.length is not None, "Task.rows fills it in"
    return settings.length
