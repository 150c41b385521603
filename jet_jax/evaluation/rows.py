"""Rows: a set of questions as token arrays, to be scored with one forward pass each.

A generator writes `Passage`s, each a text with its answers marked; `pack` puts them into rows.
An answer is scored under teacher forcing: the model sees the right tokens before each of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32

from kernels_pallas.segments import validate_segment_ids


class Passage:
    """Token ids in writing, and which of them are answers.

    Attributes:
      ids: the token ids so far.
      items: for each, 0 or the number of the answer it belongs to, from 1 in each passage.
      num_items: answers so far.
    """

    def __init__(self, ids: Iterable[int] = ()):
        self.ids: list[int] = [int(i) for i in ids]
        self.items: list[int] = [0] * len(self.ids)
        self.num_items = 0

    def write(self, ids: Iterable[int]) -> Passage:
        """Adds tokens that are given."""
        before = len(self.ids)
        self.ids += [int(i) for i in ids]
        self.items += [0] * (len(self.ids) - before)
        return self

    def ask(self, ids: Iterable[int]) -> Passage:
        """Adds the tokens of one answer, which the model has to predict."""
        before = len(self.ids)
        self.ids += [int(i) for i in ids]
        self.num_items += 1
        self.items += [self.num_items] * (len(self.ids) - before)
        return self


@dataclass(frozen=True, eq=False)
class Rows:
    """One set of items, ready to score. N rows of T tokens; padding is 0 everywhere.

    Attributes:
      tokens: token ids.
      targets: what each position has to predict.
      segment_ids: from 1 in each row, 0 for padding.
      answers: 0 where nothing is scored; `a` from 1 to `num_items` where the target belongs to
        answer `a`, counted over the whole set.
      groups: the question of each item. Items of one group are its choices; free answers have a
        group each.
      right: whether an item is the right choice; True for free answers.
      name: of the set, for reports and messages.

    Raises:
      ValueError: for shapes that differ, answers that are missing or on padding, a group without
        exactly one right choice, or groups of which some have one item and some have several.
    """

    tokens: Int32[np.ndarray, "N T"]
    targets: Int32[np.ndarray, "N T"]
    segment_ids: Int32[np.ndarray, "N T"]
    answers: Int32[np.ndarray, "N T"]
    groups: Int32[np.ndarray, " items"]
    right: Bool[np.ndarray, " items"]
    name: str

    def __post_init__(self):
        for field in ("targets", "segment_ids", "answers"):
            shape = getattr(self, field).shape
            if shape != self.tokens.shape:
                raise ValueError(
                    f"{self.name}: {field} has shape {shape}, tokens {self.tokens.shape}"
                )
        if self.groups.shape != self.right.shape or self.groups.ndim != 1 or not self.num_items:
            raise ValueError(
                f"{self.name}: groups {self.groups.shape} and right {self.right.shape} must both "
                "hold one value an item, and there must be an item"
            )
        validate_segment_ids(self.segment_ids)
        if (self.answers[self.segment_ids == 0] != 0).any():
            raise ValueError(f"{self.name}: an answer lies on padding (segment id 0)")
        found = np.unique(self.answers[self.answers != 0])
        if not np.array_equal(found, np.arange(1, self.num_items + 1)):
            raise ValueError(
                f"{self.name}: answers holds {len(found)} numbers other than 0; expected each of "
                f"1 to {self.num_items}, the number of items"
            )
        _, group, counts = np.unique(self.groups, return_inverse=True, return_counts=True)
        if (np.bincount(group, self.right) != 1).any():
            raise ValueError(f"{self.name}: a group must hold exactly one right item")
        if counts.min() == 1 and counts.max() > 1:
            raise ValueError(
                f"{self.name}: some questions have choices and some have a free answer; "
                "make two sets of them"
            )

    @property
    def num_items(self) -> int:
        """Answers in the set, all choices of all questions."""
        return len(self.groups)

    @property
    def has_choices(self) -> bool:
        """Whether the items are choices, several a question, and not free answers."""
        return len(np.unique(self.groups)) < self.num_items

    @property
    def positions(self) -> Int32[np.ndarray, "N T"]:
        """Counts from 0 in each segment; 0 on padding."""
        at = np.broadcast_to(np.arange(self.tokens.shape[1]), self.tokens.shape)
        first = np.ones(self.tokens.shape, bool)
        first[:, 1:] = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        start = np.maximum.accumulate(np.where(first, at, 0), axis=1)
        return np.where(self.segment_ids != 0, at - start, 0).astype(np.int32)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Gives `tokens`, `targets`, `segment_ids`, `answers` and `positions` of `size` rows.

        The last batch is filled up with empty rows.

        Raises:
          ValueError: `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"a batch of {size} rows; expected at least 1")
        names = ("tokens", "targets", "segment_ids", "answers", "positions")
        arrays = {name: getattr(self, name) for name in names}
        for start in range(0, len(self.tokens), size):
            batch = {name: array[start : start + size] for name, array in arrays.items()}
            missing = size - len(batch["tokens"])
            yield {name: np.pad(x, [(0, missing), (0, 0)]) for name, x in batch.items()}


def pack(
    passages: Sequence[Passage],
    length: int,
    *,
    name: str,
    groups: Sequence[int] | None = None,
    right: Sequence[bool] | None = None,
) -> Rows:
    """Packs passages into rows of `length` tokens, each whole and first-fit, a segment each.

    Args:
      passages: of at most `length` + 1 ids: the last one is only a target.
      length: tokens of a row.
      name: of the set.
      groups: the question of each item, in the order of passages; None for free answers.
      right: whether each item is right; None for free answers.

    Raises:
      ValueError: no passages, or one that is too short, too long, without an answer, or begins
        with one, which nothing could predict.
    """
    if not passages:
        raise ValueError(f"{name}: there are no passages to make rows of")
    used, segments, items = [], [], 0  # tokens and segments of each row
    places = []
    for number, passage in enumerate(passages):
        size = len(passage.ids) - 1
        if not 1 <= size <= length:
            raise ValueError(
                f"{name}: passage {number} has {size + 1} tokens; rows of {length} hold passages "
                f"of 2 to {length + 1}; set length to {max(size, 1)} or leave the passage out"
            )
        if passage.items[0] or not passage.num_items:
            raise ValueError(f"{name}: passage {number} needs a prompt and an answer after it")
        room = np.flatnonzero(np.asarray(used, np.int64) + size <= length)
        row = int(room[0]) if len(room) else len(used)
        if row == len(used):
            used.append(0)
            segments.append(0)
        segments[row] += 1
        places.append((row, used[row], segments[row], items))
        used[row] += size
        items += passage.num_items
    arrays = np.zeros((4, len(used), length), np.int32)
    tokens, targets, segment_ids, answers = arrays
    for passage, (row, start, segment, before) in zip(passages, places, strict=True):
        here = slice(start, start + len(passage.ids) - 1)
        marks = np.asarray(passage.items[1:])
        tokens[row, here] = passage.ids[:-1]
        targets[row, here] = passage.ids[1:]
        segment_ids[row, here] = segment
        answers[row, here] = np.where(marks > 0, marks + before, 0)
    return Rows(
        tokens,
        targets,
        segment_ids,
        answers,
        np.asarray(np.arange(items) if groups is None else groups, np.int32),
        np.ones(items, bool) if right is None else np.asarray(right, bool),
        name,
    )
