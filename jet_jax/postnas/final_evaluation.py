"""What a search comes to: the teacher, the hybrid and what training made of it, side by side.

Items are of the split "test", which neither placement nor comparisons have seen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jet_jax import io
from jet_jax.evaluation import statistics
from jet_jax.evaluation.comparisons import texts_of
from jet_jax.models.lm import HybridLM
from jet_jax.postnas.measuring import measure
from jet_jax.postnas.objectives import Objective
from jet_jax.postnas.report import markdown
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import TRAINED
from jet_jax.progress import Display

SPEEDS = ("decode_tokens_s", "prefill_tokens_s")
SPLIT = "test"


def evaluate(search: Search) -> dict[str, Any]:
    """Scores the models that the search has made by all objectives, and times the last of them.

    Returns:
      JSON-safe: `objectives` by name, with their `figure`, `more_is_better` and number of `items`;
      `models`, of "teacher", "hybrid", "distill" and "finetune" those that there are, with
      `parameters`, `cache_bytes` of one sequence at `context` tokens, and `figures` by objective:
      `value`, and for a figure of questions `difference`, its own less the teacher's with `low` and
      `high`, the 95 % bootstrap interval over texts; and where `config.measure` is set, `measure`
      and for the teacher and the last model `decode_tokens_s`, `prefill_tokens_s`, `device` and
      `note`, as `measure` gives them.

    Raises:
      ValueError: there is no hybrid yet.
    """
    c = search.config
    made = ["hybrid", *(name for name in TRAINED if search.is_done(name))]
    places = {"teacher": c.teacher} | {name: search.model(name) for name in made}
    objectives = [search.objective(name, SPLIT) for name in c.placement.objectives]
    display = Display(0, live=False)
    context = c.measure.context if c.measure else search.teacher.max_position_embeddings
    teacher = _load(search, c.teacher)
    models: dict[str, Any] = {}
    questions: dict[str, Any] = {}  # the teacher's, by objective
    for name, place in places.items():
        model = teacher if name == "teacher" else _load(search, place)
        found: dict[str, Any] = {}
        models[name] = {
            "parameters": model.config.param_count(),
            "cache_bytes": model.config.cache_bytes(context),
            "figures": found,
        }
        for objective in objectives:
            with jax.set_mesh(search.mesh):
                results = objective.evaluate(model, teacher, c.placement.batch_size)
            own = objective.questions(results)
            if name == "teacher":
                questions[objective.name] = own
            difference = None
            if own is not None and name != "teacher":
                sign = 1 if objective.more_is_better else -1
                difference = _difference(objective, sign * own, sign * questions[objective.name])
            found[objective.name] = {"value": objective.value(results), "difference": difference}
        values = (f"{o.name} {o.figure} {found[o.name]['value']:.4g}" for o in objectives)
        display.say(f"{name}: {', '.join(values)}")
        if c.measure and name in ("teacher", made[-1]):
            sizes = dataclasses.asdict(c.measure)
            timed = measure(model.config, **sizes, directory=search.workdir / "measurements")
            models[name] |= {key: timed[key] for key in (*SPEEDS, "device", "note")}
    return {
        "split": SPLIT,
        "objectives": {
            o.name: {
                "figure": o.figure,
                "more_is_better": o.more_is_better,
                "items": o.rows.num_items,
            }
            for o in objectives
        },
        "context": context,
        "models": models,
        "measure": dataclasses.asdict(c.measure) if c.measure else None,
    }


def _load(search: Search, place: str) -> HybridLM:
    model = io.load(place, dtype=search.teacher.dtype, mesh=search.mesh)
    model.scan_layers = True
    return model


def _difference(objective: Objective, own: np.ndarray, teachers: np.ndarray) -> dict[str, float]:
    unit = texts_of(objective.rows)
    sums = np.bincount(unit, own), np.bincount(unit, teachers)
    interval = statistics.bootstrap_difference(*sums, np.bincount(unit).astype(np.float64))
    return {k: float(x) for k, x in zip(("value", "low", "high"), interval, strict=True)}


def rows(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """The table of an evaluation: its head and its rows, numbers as they are shown."""
    objectives, models = evaluation["objectives"], evaluation["models"]
    timed = [s for s in SPEEDS if any(s in model for model in models.values())]
    head = ["model", *(f"{n}: {o['figure']} {'↑' if o['more_is_better'] else '↓'}"
                       for n, o in objectives.items())]  # fmt: skip
    head += ["parameters, M", f"cache at {evaluation['context']:,}, MiB"]
    head += [f"{speed.split('_')[0]}, tokens/s" for speed in timed]
    head += [f"{speed.split('_')[0]}, of the teacher's" for speed in timed]
    out = []
    for name, model in models.items():
        row: list[Any] = [name, *(_figure(model["figures"][o]) for o in objectives)]
        row += [f"{model['parameters'] / 1e6:,.1f}", f"{model['cache_bytes'] / 2**20:,.1f}"]
        row += [f"{model[s]:,.0f}" if model.get(s) else "" for s in timed]
        base = models["teacher"]
        row += [f"{model[s] / base[s]:.2f}" if model.get(s) and base.get(s) else "" for s in timed]
        out.append(row)
    return head, out


def caption(evaluation: Mapping[str, Any]) -> str:
    """What the table's numbers are."""
    counts = ", ".join(f"{n} {o['items']:,}" for n, o in evaluation["objectives"].items())
    text = f"Items of the split {evaluation['split']!r}, which no decision was made by ({counts})."
    figures = [f for model in evaluation["models"].values() for f in model["figures"].values()]
    if any(figure["difference"] for figure in figures):
        text += " In brackets the difference from the teacher, its 95 % interval over texts."
    if sizes := evaluation["measure"]:
        device = evaluation["models"]["teacher"]["device"]
        text += (
            f" Decoding: {sizes['batch']} sequences with {sizes['context']:,} tokens in the cache; "
            f"prefill: {sizes['prefill_batch']} x {sizes['prefill_length']:,} tokens, "
            f"{sizes['chunk']:,} at a time; random weights of the same shapes, on {device}."
        )
    for name, model in evaluation["models"].items():
        if model.get("note"):  # why a speed is missing
            text += f" {name}: {model['note']}."
    return text


def table(evaluation: Mapping[str, Any]) -> str:
    """The evaluation in Markdown."""
    return f"{markdown(*rows(evaluation))}\n{caption(evaluation)}\n"


def _figure(figure: Mapping[str, Any]) -> str:
    text = f"{figure['value']:.4g}"
    if d := figure["difference"]:
        text += f" ({d['value']:+.3g}, {d['low']:+.3g} to {d['high']:+.3g})"
    return text
