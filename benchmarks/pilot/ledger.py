"""What is done, on disk after every piece, and how much time is left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from jet_jax.postnas.json_files import plain, read_json, write_json


class OutOfTime(Exception):
    """The time is up; what is done is on disk."""


class Clock:
    """The time that a run may take.

    Args:
      minutes: from now on; None for no limit.
    """

    def __init__(self, minutes: float | None):
        self.start = time.monotonic()
        self._end = None if minutes is None else self.start + 60 * minutes
        self.longest = 0.0  # seconds of the longest piece so far

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def check(self, needed: float = 0.0) -> None:
        """Raises OutOfTime unless so many seconds are left."""
        if self.left() < needed:
            raise OutOfTime


class Ledger:
    """The results of a pilot, in one JSON file that is replaced after every piece.

    Args:
      path: the file; taken up where it exists.
      settings: what a result depends on, JSON-safe.

    Raises:
      ValueError: the file holds results of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path = path
        self.data: dict[str, Any] = {"settings": settings, "runs": [], "pieces": {}}
        if found := read_json(path):
            self.data, there = found, found["settings"]
            if there != plain(settings):
                raise ValueError(f"{path} holds another pilot, {there}; give another --out")

    def __contains__(self, name: str) -> bool:
        return name in self.data["pieces"]

    def __getitem__(self, name: str) -> Any:
        return self.data["pieces"][name]

    def begin(self, facts: dict[str, Any]) -> None:
        """Notes where the pieces to come are measured."""
        self.data["runs"].append(facts)

    def put(self, name: str, result: Any) -> None:
        """Notes a result."""
        self.data["pieces"][name] = {"run": len(self.data["runs"]) - 1, **result}
        write_json(self.path, self.data)

    def named(self, prefix: str) -> dict[str, Any]:
        """The results whose names begin so, without that beginning."""
        pieces = self.data["pieces"].items()
        return {name.removeprefix(prefix): x for name, x in pieces if name.startswith(prefix)}
