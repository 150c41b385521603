"""Results on disk: JSON files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, replacing one that is there as a whole; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> Any:
    """The value of a JSON file; None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def plain(value: Any) -> Any:
    """The value as a JSON file gives it back: tuples are lists, keys are text."""
    return json.loads(json.dumps(value))
