"""Arithmetic: sums to work out, after some worked out, in rows of one text each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import haystack, splits
from jet_jax.evaluation.haystack import encode
from jet_jax.evaluation.rows import Passage, Rows, pack

Question = tuple[str, int]


def arithmetic(
    tokenizer: TextTokenizer,
    seed: int,
    num_rows: int,
    length: int,
    *,
    kind: str = "addition",
    digits: int = 2,
    steps: int = 3,
    shots: int = 4,
    num_queries: int = 4,
    split: str = "test",
) -> Rows:
    """Makes questions like "37 + 58 =" with the answer " 95" and the end of the line.

    The line's end belongs to the answer, so that 957 is not taken for 95. No question is asked
    twice in a set, and the examples come from its split too.

    Args:
      tokenizer: of the model.
      seed: of the random numbers.
      num_rows: texts of `shots` examples and `num_queries` questions each; short ones share a row.
      length: tokens of a row.
      kind: "addition", "subtraction" (never below 0) or "chain", which adds and subtracts several
        times: "7 + 5 - 3 =".
      digits: of each number.
      steps: operations of a chain.
      shots: examples before the first question of a text.
      num_queries: questions of a text; each stands as an example before the next.
      split: of the questions.

    Raises:
      ValueError: an unknown kind, a length too short, or too few different questions.
    """
    if kind not in KINDS:
        raise ValueError(f"arithmetic: kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    for option, value, least in (
        ("num_rows", num_rows, 1),
        ("digits", digits, 1),
        ("steps", steps, 1),
        ("shots", shots, 0),
        ("num_queries", num_queries, 1),
    ):
        if value < least:
            raise ValueError(f"arithmetic: {option}={value} must be at least {least}")
    rng = splits.random(seed, split)
    asked: set[str] = set()

    def draw(is_new: bool) -> Question:
        for _ in range(1000):
            text, answer = KINDS[kind](rng, digits, steps)
            if splits.split_of(text) == split and not (is_new and text in asked):
                if is_new:
                    asked.add(text)
                return text, answer
        raise ValueError(
            f"arithmetic: {len(asked)} different questions found for the split {split!r}, but "
            f"{num_rows * num_queries} are needed; raise digits or ask for fewer"
        )

    def write() -> Passage:
        passage = haystack.start(tokenizer)
        for i in range(shots + num_queries):
            text, answer = draw(is_new=i >= shots)
            passage.write(encode(tokenizer, f"{text} ="))
            ids = encode(tokenizer, f" {answer}\n")
            passage.ask(ids) if i >= shots else passage.write(ids)
        return passage

    passages = [write() for _ in range(num_rows)]
    longest = max(len(p.ids) for p in passages) - 1
    if longest > length:
        raise ValueError(
            f"arithmetic: length={length} is too short for {shots} examples and {num_queries} "
            f"questions; set it to at least {longest} or ask for fewer"
        )
    return pack(passages, length, name=kind)


def _number(rng: np.random.Generator, digits: int) -> int:
    low = 10 ** (digits - 1)
    return int(rng.integers(low if digits > 1 else 0, 10 * low))


def _addition(rng: np.random.Generator, digits: int, steps: int) -> Question:
    a, b = _number(rng, digits), _number(rng, digits)
    return f"{a} + {b}", a + b


def _subtraction(rng: np.random.Generator, digits: int, steps: int) -> Question:
    b, a = sorted((_number(rng, digits), _number(rng, digits)))
    return f"{a} - {b}", a - b


def _chain(rng: np.random.Generator, digits: int, steps: int) -> Question:
    total = _number(rng, digits)
    text = str(total)
    for _ in range(steps):
        b = _number(rng, digits)
        sign = -1 if b <= total and rng.random() < 0.5 else 1
        total += sign * b
        text += f" {'-' if sign < 0 else '+'} {b}"
    return text, total


KINDS: dict[str, Callable[[np.random.Generator, int, int], Question]] = {
    "addition": _addition,
    "subtraction": _subtraction,
    "chain": _chain,
}
