"""Which settings of a search may change in its workdir, and what is to be done again then."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jet_jax.params import flatten
from jet_jax.postnas.comparison_folder import OPEN
from jet_jax.postnas.search_config import COMPARED, STAGES, TRAINED, SearchConfig

UNSET = "not set"
Settings = Mapping[str, Any]
# Settings that say how a search is computed, not what it is.
HOW = (
    r"(mesh|distributed|measure)\.|(log_every|checkpoint_every|compile_cache|measure)$",
    r"data\.(num_threads|prefetch)$",
    r"placement\.(batch_size|chunk)$",
    r"(align|supernet)\.(accumulation|remat)$",
    r"(distill|finetune)\.(accumulation|remat|log_every|keep_checkpoints|mesh\.\w+)$",
    r"(distill|finetune)\.(checkpoint|eval|sample|profile)_\w+$",
    rf"({'|'.join(COMPARED)})\.({'|'.join(OPEN)})(\.|$)",
)
SILENT = ("remat", "keep_weights")  # settings of a comparison that change nothing of its result


def changes(there: Settings, here: Settings, workdir: Path) -> list[str]:
    """The settings that differ from those that results in a workdir depend on.

    Args:
      there: the settings that the workdir was begun with.
      here: those of now; a comparison or a run that they leave out is no change.
      workdir: of the search.

    Returns:
      A line for each, to be shown.
    """
    old, new = flatten(there), flatten(here)
    free = re.compile("|".join((*HOW, *unused(workdir))))
    out = []
    for name in (*new, *(x for x in old if x not in new)):
        section = name.split(".")[0]
        left_out = section in (*COMPARED, *TRAINED) and None in (
            there.get(section), here.get(section)
        )  # fmt: skip
        if free.match(name) or left_out or old.get(name, UNSET) == new.get(name, UNSET):
            continue
        out.append(f"  {name}: {old.get(name, UNSET)!r} there, {new.get(name, UNSET)!r} here")
    return out


def refuse_changes(there: Settings, here: Settings, workdir: Path) -> None:
    """Raises ValueError, listing them, where there are `changes`."""
    if changed := changes(there, here, workdir):
        lines = "\n".join(changed)
        raise ValueError(
            f"{workdir} holds another search:\n{lines}\nGive another --workdir, or delete what "
            "depends on them (STAGE.json and the folder STAGE, and those of the stages after it)."
        )


def unused(workdir: Path) -> list[str]:
    """Patterns of the settings that no result in a workdir depends on yet."""

    def begun(stage: str) -> bool:
        return any((workdir / name).exists() for name in (stage, f"{stage}.json"))

    if not any(begun(stage) for stage in STAGES):
        return [""]
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


def to_keep(there: Settings, here: Settings) -> dict[str, Any]:
    """The settings of now, with those of comparisons and runs that they leave out."""
    names = (name for name in (*COMPARED, *TRAINED) if here.get(name) is None)
    return {**here, **{name: there[name] for name in names if there.get(name) is not None}}


def forget(there: Settings, here: Settings, workdir: Path, config: SearchConfig) -> None:
    """Deletes results that are no longer what the settings ask for, and what was made of them."""
    stale = {later for stage in reopened(there, here) for later in made_of(config, stage)}
    if there != here:  # another teacher, say, before anything was trained
        stale.add("gates")
    for name in stale:
        (workdir / f"{name}.json").unlink(missing_ok=True)


def reopened(there: Settings, here: Settings) -> list[str]:
    """Stages whose result is no longer what the settings ask for: a comparison with another arm.

    To be run again, whereby what is done of it stays done.
    """
    out = [] if there.get("measure") == here.get("measure") else ["evaluate"]
    for name in COMPARED:
        if there.get(name) is not None and here.get(name) is not None:
            old, new = (
                {k: v for k, v in x[name].items() if k not in SILENT} for x in (there, here)
            )
            out += [name] if old != new else []
    return out


def made_of(config: SearchConfig, stage: str) -> list[str]:
    """A stage, and the later ones that use its result.

    Args:
      config: of the search.
      stage: of `STAGES`.
    """
    if stage in COMPARED and config.final != stage:
        return [stage, "report"]  # nothing else is made of it
    later = STAGES[STAGES.index(stage) + 1 :]
    return [stage, *(x for x in later if stage not in COMPARED or x not in COMPARED)]
