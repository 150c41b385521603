"""Which settings of a search may change in its workdir: those that nothing there depends on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jet_jax.params import flatten
from jet_jax.postnas.search_config import COMPARED, TRAINED

UNSET = "not set"
# Settings that say how a search is computed, not what it is.
HOW = (
    r"(mesh|distributed|measure)\.|(log_every|checkpoint_every|compile_cache)$",
    r"data\.(num_threads|prefetch)$",
    r"placement\.(batch_size|chunk)$",
    r"supernet\.(accumulation|remat)$",
    r"(distill|finetune)\.(accumulation|remat|log_every|keep_checkpoints|mesh\.\w+)$",
    r"(distill|finetune)\.(checkpoint|eval|sample|profile)_\w+$",
    r"(blocks|ablations|shapes)\.(remat|accumulation|keep_weights|measure\.\w+)$",
    r"(blocks|ablations|shapes)\.(seeds|learning_rates|reference)$",
    r"(blocks|ablations|shapes)\.arms\.",
)


def changes(there: Mapping[str, Any], here: Mapping[str, Any], workdir: Path) -> list[str]:
    """The settings that differ from those that results in a workdir depend on.

    Args:
      there: the settings that the workdir was begun with.
      here: those of now.
      workdir: of the search.

    Returns:
      A line for each, to be shown.
    """
    old, new = flatten(there), flatten(here)
    free = re.compile("|".join((*HOW, *unused(workdir))))
    out = []
    for name in (*new, *(x for x in old if x not in new)):
        section = name.split(".")[0]
        either_has_none = there.get(section) is None or here.get(section) is None
        if free.match(name) or either_has_none or old.get(name, UNSET) == new.get(name, UNSET):
            continue
        out.append(f"  {name}: {old.get(name, UNSET)!r} there, {new.get(name, UNSET)!r} here")
    return out


def unused(workdir: Path) -> list[str]:
    """Patterns of the settings that no result in a workdir depends on yet."""

    def begun(stage: str) -> bool:
        return any((workdir / name).exists() for name in (stage, f"{stage}.json"))

    # A comparison's own folder says what it is of, so that it may be begun.
    out = [rf"{name}\." for name in COMPARED if not (workdir / f"{name}.json").exists()]
    out += [rf"{name}\." for name in ("align", "supernet", *TRAINED) if not begun(name)]
    if not (workdir / "hybrid.json").exists():
        out.append("final(_options)?")
    if not (workdir / "placement.json").exists():
        scored = (workdir / "placement" / "scores.jsonl").exists()
        of_scores = r"(objectives|window$)" if scored else r"window$"  # paths train with the window
        out.append(rf"placement\.(?!{of_scores})")
    return out
