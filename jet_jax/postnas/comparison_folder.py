"""A comparison's folder belongs to one comparison: FOLDER/comparison.json says to which."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from jet_jax.option_checks import require
from jet_jax.params import flatten
from jet_jax.postnas.arm_runs import ArmRuns, seed_name
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.json_files import plain, read_json, write_json
from jet_jax.postnas.objectives import Objective

# Settings that may change between two calls: they add runs, or say how things are computed.
OPEN = ("arms", "reference", "judged_by", "learning_rates", "seeds", "measure", "keep_weights",
        "remat")  # fmt: skip


def check_folder(
    settings: ComparisonConfig,
    context: ComparisonContext,
    arms: Sequence[ArmRuns],
    judges: Sequence[Objective],
    folder: Path,
) -> None:
    """Sees whether a folder's runs, if there are any, are those of a comparison, and notes it.

    Args:
      settings: of the comparison.
      context: what its arms share.
      arms: the arms.
      judges: the objectives that they are judged by.
      folder: what the comparison writes to.

    Raises:
      ValueError: it holds another comparison, or finished runs that were judged by fewer
        objectives.
    """
    path = folder / "comparison.json"
    mine, there = plain(_identity(settings, context, arms)), read_json(path)
    if there is not None:
        old, new = flatten(there), flatten(mine)
        changed = [
            f"  {name}: {old[name]!r} there, {value!r} here"
            for name, value in new.items()
            if name in old and old[name] != value
        ]
        if changed:
            lines = "\n".join(changed)
            raise ValueError(
                f"{folder} holds another comparison:\n{lines}\nDelete it, or use another workdir."
            )
        for name in ("arms", "objectives"):  # those that are left out now keep their results
            mine[name] = there[name] | mine[name]
        mine = there | mine
    _check_judged(arms, judges)
    write_json(path, mine)


def _identity(
    settings: ComparisonConfig, context: ComparisonContext, arms: Sequence[ArmRuns]
) -> dict[str, Any]:
    """What the runs and their figures depend on."""
    values = {k: v for k, v in dataclasses.asdict(settings).items() if k not in OPEN}
    values["first_seed"] = settings.seeds[0]  # whose alignment the learning rates are tried on
    data, tuning = context.data, {"name": context.tuning.name, **_scored(context.tuning)}
    return {
        "settings": values,
        "path": [int(x) for x in context.path],
        "data": {"train": data.train, "tokenizer": data.tokenizer, **data.stream_settings()},
        "objectives": {o.name: _scored(o) for o in context.objectives},
        **({"tuning": tuning} if len(settings.learning_rates) > 1 else {}),
        "arms": {runs.name: runs.config.to_dict() for runs in arms},
    }


def _scored(objective: Objective) -> dict[str, str]:
    """What an objective's figure is taken of."""
    rows, digest = objective.rows, hashlib.sha256()
    for array in (rows.tokens, rows.answers):
        digest.update(np.ascontiguousarray(array))
    return {"figure": objective.figure, "rows": digest.hexdigest()[:16]}


def _check_judged(arms: Sequence[ArmRuns], judges: Sequence[Objective]) -> None:
    """Refuses objectives that finished runs were not judged by: their weights may be gone."""
    for objective in judges:
        lacking = []
        for runs in arms:
            for seed, rate in product(runs.settings.seeds, runs.settings.learning_rates):
                path = runs.folder / f"{seed_name(seed, rate)}.json"
                figures = (read_json(path) or {}).get("figures")
                if figures is not None and objective.name not in figures:
                    lacking.append(f"  {path}\n")
        require(
            not lacking,
            f"judged_by: finished runs have no figure of {objective.name!r}:\n{''.join(lacking)}"
            "Leave it out of judged_by, use another workdir, or delete these files to have the "
            "runs done again.",
        )
