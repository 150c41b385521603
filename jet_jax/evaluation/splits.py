"""Items for searching, tuning and testing that never coincide.

An item belongs to the split that a hash of its content names, whatever generator or seed made it.
A generator for one split draws items and keeps those that belong there, so two splits share no
item even where few different ones exist. Documents are split the same way, by their text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from jet_jax.evaluation.rows import Passage

SPLITS = ("search", "tuning", "test")  # a third of all items each


def split_of(content: str | Sequence[int]) -> str:
    """The split of a text or of token ids: the same on every machine."""
    if isinstance(content, str):
        data = content.encode()
    else:
        data = np.asarray(content, "<i4").tobytes()
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "little") % len(SPLITS)]


def random(seed: int, split: str) -> np.random.Generator:
    """The random numbers of a split.

    Raises:
      ValueError: an unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; use one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed={seed} must be at least 0")
    return np.random.default_rng([seed, SPLITS.index(split)])


def documents_of(documents: Sequence[str], split: str | None) -> list[str]:
    """The documents that belong to a split, in order; all of them for None.

    Raises:
      ValueError: an unknown split, no documents, or none of that split.
    """
    if not documents:
        raise ValueError("the list of documents is empty; give at least one text")
    if split is None:
        return list(documents)
    random(0, split)
    found = [text for text in documents if split_of(text) == split]
    if not found:
        raise ValueError(
            f"none of the {len(documents)} documents belongs to the split {split!r} (by hash, a "
            "third does); give more documents"
        )
    return found


def draw(
    make: Callable[[np.random.Generator], Passage],
    seed: int,
    split: str | None,
    count: int,
    name: str,
) -> list[Passage]:
    """Draws `count` passages that belong to a split, no two alike; any passages for None.

    Raises:
      ValueError: an unknown split, a count below 1, or too few different passages.
    """
    if count < 1:
        raise ValueError(f"{name}: num_rows={count} must be at least 1")
    rng = random(seed, split or "test")
    found: dict[tuple[int, ...], Passage] = {}
    for _ in range(100 + 20 * count):
        passage = make(rng)
        if split is None or split_of(passage.ids) == split:
            found.setdefault(tuple(passage.ids), passage)
            if len(found) == count:
                return list(found.values())
    raise ValueError(
        f"{name}: only {len(found)} different rows of {count} found (split {split!r}); ask "
        "for fewer rows or for longer ones with more to choose from"
    )
