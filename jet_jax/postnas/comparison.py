"""Compares layers: the engine behind block selection, ablations and the search over shapes.

For each arm: align the new layers to the teacher's attention, once a seed; choose the arm's own
learning rate by short runs from the first seed's alignment; train every seed on at that rate; judge
it; measure memory and speed on the device at hand. See `comparison_config` for the settings and
`arm_runs` for what is on disk.

    FOLDER/comparison.json      what is compared; a folder belongs to one comparison
    FOLDER/ARM/...              the runs
    FOLDER/results.json, table.md, bars.png      what came out, written anew after every arm

Source: arXiv 2508.15884 §2.3 (table 1) and §2.5 (table 2), whose runs have 50 billion tokens each;
what short runs need beside is argued in docs/postnas.md.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jet_jax import sharding
from jet_jax.option_checks import require
from jet_jax.postnas import comparison_report, supernet
from jet_jax.postnas.arm_runs import ArmRuns, seed_name, tuning_name
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.comparison_figures import bars
from jet_jax.postnas.comparison_folder import check_folder
from jet_jax.postnas.json_files import plain, read_json, write_json
from jet_jax.postnas.measuring import measure
from jet_jax.postnas.objectives import Objective, check_objectives
from jet_jax.postnas.shapes import shape_of
from jet_jax.progress import Display


def compare(settings: ComparisonConfig, folder: Path, context: ComparisonContext) -> dict[str, Any]:
    """Runs a comparison, or what is missing of it.

    Args:
      settings: arms, steps, seeds.
      folder: what it writes to.
      context: what all arms share.

    Returns:
      What `comparison_report.summarise` gives, JSON-safe.

    Raises:
      ValueError: what does not fit, before any compute; a folder of another comparison; or a
        teacher that does not pass an objective's gate.
      Stopped: after SIGTERM or Ctrl-C, when the step in hand is saved.
    """
    arms = check(settings, folder, context)
    judges = judges_of(settings, context)
    teacher = teacher_figures(context, judges, folder)
    display = Display(0, live=False)
    clock = _Clock(settings)
    results: dict[str, Any] = {}
    for runs in arms:
        results[runs.name] = _run_arm(runs, judges, clock, display)
        summary = comparison_report.summarise(settings, context, judges, teacher, results)
        write_json(folder / "results.json", summary)
        table = comparison_report.markdown(summary)
        (folder / "table.md").write_text(table, encoding="utf-8")
        bars(summary, folder / "bars.png")
    return plain(summary)


def check(settings: ComparisonConfig, folder: Path, context: ComparisonContext) -> list[ArmRuns]:
    """Finds what is wrong before any compute is spent.

    Returns:
      The arms.

    Raises:
      ValueError: naming what does not fit, a folder of another comparison, or finished runs that
        were judged by fewer objectives.
    """
    supernet.check_teacher(context.teacher.config)
    sharding.check_batch(context.data.batch_size, context.mesh, settings.accumulation)
    sharding.check_batch(context.batch_size, context.mesh)
    judges = judges_of(settings, context)
    arms = [ArmRuns(name, settings, context, folder / name) for name in settings.arms]
    for runs in arms:
        runs.check()
    check_folder(settings, context, arms, judges, folder)
    return arms


def judges_of(settings: ComparisonConfig, context: ComparisonContext) -> list[Objective]:
    """The objectives that arms are judged by. Raises ValueError for a name that is none."""
    check_objectives(context.objectives)
    known = {objective.name: objective for objective in context.objectives}
    for name in settings.judged_by:
        require(name in known, f"judged_by: {name!r} is no objective; there are {', '.join(known)}")
    return [known[name] for name in settings.judged_by or known]


def teacher_figures(
    context: ComparisonContext, judges: Sequence[Objective], folder: Path
) -> dict[str, float]:
    """The teacher's own figures; raises ValueError if it does not pass an objective's gate."""
    path = folder / "teacher.json"
    known = read_json(path) or {}
    for objective in judges:
        if objective.name not in known:
            results = context.score(context.reader, objective)
            objective.check_gate(results)
            known[objective.name] = objective.value(results)
            write_json(path, known)
    return {o.name: known[o.name] for o in judges}


def choose_rate(
    tuned: dict[float, float | None], objective: Objective
) -> tuple[float | None, bool]:
    """The learning rate whose short run is best, and whether it is at an end of those tried.

    Args:
      tuned: figures of `objective` by rate, None where training diverged.
      objective: says whether more is better.
    """
    sign = 1 if objective.more_is_better else -1
    values = {rate: sign * x for rate, x in tuned.items() if x is not None and np.isfinite(x)}
    if not values:
        return None, False
    best = max(values, key=lambda rate: values[rate])
    return best, len(tuned) > 1 and best in (min(tuned), max(tuned))


def _run_arm(
    runs: ArmRuns, judges: Sequence[Objective], clock: _Clock, display: Display
) -> dict[str, Any]:
    """All of one arm: sizes, speeds, learning rate, and a result for every seed."""
    settings, context = runs.settings, runs.context
    out = describe(runs)
    rates, tuned = settings.learning_rates, {}
    if len(rates) == 1:
        rate, at_end = rates[0], False
    else:
        for x in rates:
            with clock.run("tuning_steps", runs.is_done(tuning_name(x))):
                tuned[x] = runs.tune(x)["value"]
            text = "diverged" if tuned[x] is None else f"{context.tuning.name} {tuned[x]:.4g}"
            display.say(f"{runs.name}, learning rate {x:g}: {text}. {clock}")
        rate, at_end = choose_rate(tuned, context.tuning)
    out |= {"tuned": {f"{x:g}": value for x, value in tuned.items()}, "learning_rate": rate,
            "at_end": at_end}  # fmt: skip
    seeds = {}
    for seed in settings.seeds:
        if rate is None:
            break
        with clock.run("steps", runs.is_done(seed_name(seed, rate))):
            found = seeds[str(seed)] = runs.judge(seed, rate, judges)
        text = found["note"] or ", ".join(f"{k} {x:.4g}" for k, x in found["figures"].items())
        display.say(f"{runs.name}, seed {seed}: {text}. {clock}")
    runs.tidy()
    notes = [f"seed {seed} {x['note']}" for seed, x in seeds.items() if x["note"]]
    if rate is None:
        notes.append("diverged at every learning rate")
    return out | {"seeds": seeds, "note": "; ".join(notes) or None}


def describe(runs: ArmRuns) -> dict[str, Any]:
    """An arm's layers and sizes, and the speeds that the settings ask for."""
    config, settings = runs.config, runs.settings
    kind = settings.arms[runs.name].kind
    layer = config.options(kind)
    keeps_state = kind == "jet" or hasattr(layer, "state_shape")
    state = shape_of(config, kind).product if keeps_state else None
    out: dict[str, Any] = {
        "kind": kind,
        "options": plain(dataclasses.asdict(layer)),
        "state_elements": state,
        "parameters": config.param_count(),
        "context": config.max_position_embeddings,
    }
    if settings.measure is not None:
        sizes = dataclasses.asdict(settings.measure)
        directory = runs.context.measurements or runs.folder.parent / "_speeds"
        measured = measure(config, **sizes, directory=directory)
        names = ("decode_tokens_s", "prefill_tokens_s", "device", "note")
        out |= {"context": sizes["context"], "speeds": {name: measured[name] for name in names}}
    return out | {"cache_bytes": config.cache_bytes(out["context"])}


class _Clock:
    """Says how long the runs that are left will take, from those that were done."""

    def __init__(self, settings: ComparisonConfig):
        lengths = settings.lengths
        rates = len(settings.learning_rates) if "tuning_steps" in lengths else 0
        self._per = {
            "tuning_steps": lengths.get("tuning_steps", 0),
            "steps": settings.steps + settings.align_steps,
        }
        an_arm = rates * self._per["tuning_steps"] + len(settings.seeds) * self._per["steps"]
        self._left = len(settings.arms) * an_arm
        self._done, self._seconds = 0, 0.0

    @contextmanager
    def run(self, sort: str, is_done: bool) -> Iterator[None]:
        """Times a run of that sort, unless its result was there before."""
        start = time.perf_counter()
        yield
        self._left -= self._per[sort]
        if not is_done:
            self._done += self._per[sort]
            self._seconds += time.perf_counter() - start

    def __str__(self) -> str:
        if not self._done:
            return "Done before"
        minutes = self._seconds / self._done * self._left / 60
        return f"{self._left:,} steps left, about {minutes:.0f} min"
