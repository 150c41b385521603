"""A file of texts that grows line by line and can be gone on with after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SampleFile:
    """A .jsonl file of objects with a `text`, and beside it NAME.settings.json.

    Args:
      path: the .jsonl file.
      settings: JSON-safe settings that its rows follow from.

    Raises:
      ValueError: the file is of other settings, or nothing says of which, or no .jsonl file.
    """

    def __init__(self, path: str | os.PathLike, settings: Mapping[str, Any]):
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(f"{path} must end in .jsonl, as text to train on does")
        self.record = self.path.with_suffix(".settings.json")
        self._settings = json.loads(json.dumps(dict(settings)))
        if self.path.exists():
            self._check()
        self._file = None
        self.rows = 0

    def _check(self) -> None:
        if not self.record.is_file():
            raise ValueError(
                f"{self.path} is there, but {self.record.name}, which tells how it was made, is "
                "not; name another file"
            )
        there = json.loads(self.record.read_text(encoding="utf-8"))
        names = sorted(there.keys() | self._settings.keys())
        other = [n for n in names if there.get(n) != self._settings.get(n)]
        if other:
            shown = "; ".join(
                f"{n} {there.get(n)!r} there, {self._settings.get(n)!r} here" for n in other
            )
            raise ValueError(
                f"{self.path} is of other settings ({shown}); name another file, or delete it"
            )

    def open(self) -> SampleFile:
        """Makes the file, or goes on with it: `rows` tells how many are there.

        A last line that a kill cut off is dropped.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            part = self.record.with_suffix(".part")
            part.write_text(json.dumps(self._settings, indent=1) + "\n", encoding="utf-8")
            part.replace(self.record)
        self._file = open(self.path, "a+b")
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            end += len(line)
            self.rows += 1
        self._file.truncate(end)
        return self

    def add(self, text: str) -> None:
        """Appends one row; it is on its way to the disk when this returns."""
        assert self._file is not None
        self._file.write(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows += 1

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
