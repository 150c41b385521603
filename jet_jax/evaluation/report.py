"""What `jet-jax eval` shows and writes."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jet_jax.evaluation.comparisons import perplexity

PACKAGES = ("jet-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "lm_eval")


def console() -> Console:
    """A console; a file or a pipe has room."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=150)


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str, str], None]]:
    """A bar over `total` evaluations; yields a function to call as each begins."""
    columns = (
        BarColumn(20), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        at, begun = bar.add_task("", total=total), 0

        def step(task: str, model: str) -> None:
            nonlocal begun
            bar.update(at, completed=begun, description=f"{task}, {model}")
            begun += 1

        yield step


def start(args: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """The part of a report that says what, where and how."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    device = jax.devices()[0]
    return {
        "model": args.model,
        "teacher": args.teacher,
        "device": f"{device.platform} {device.device_kind}",
        "devices": jax.device_count(),
        "dtype": dtype,
        "versions": versions,
        "settings": {k: v for k, v in vars(args).items() if k not in ("command", "list")},
        "tasks": {},
    }


def write(path: str | None, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON where a path is given."""
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def show_tasks(console: Console, results: Mapping[str, Any]) -> None:
    """Prints tables of accuracies and of nats a token, and one of positions a set of texts."""
    for measure, title in (
        ("accuracy", "Accuracy in %, [95 % interval] over texts; loss in nats an answer"),
        ("nll", "Nats a token, [95 % interval] over documents"),
    ):
        some = {name: r for name, r in results.items() if r["measure"] == measure}
        if some:
            console.print(_table(title, some, is_percent=measure == "accuracy"))
    for name, result in results.items():
        if result["measure"] == "nll":
            console.print(_positions(name, result["models"]))


def _table(title: str, results: Mapping[str, Any], is_percent: bool) -> Table:
    """A line a task and model; columns that nothing fills are left out."""
    lines = [
        (name if i == 0 else "", f"{result['questions']:,}" if i == 0 else "", which, result)
        for name, result in results.items()
        for i, which in enumerate(result["models"])
    ]
    columns: dict[str, list[str]] = {
        "task": [Path(name).stem if name.endswith(".jsonl") else name for name, *_ in lines],
        "n": [count for _, count, *_ in lines],
        "": [which.replace("_", " ") for *_, which, _ in lines],
    }

    def fill(column: str, cell: Callable[[dict[str, Any], dict[str, Any]], str]) -> None:
        cells = [
            cell(r["models"][which], r["differences"].get(which, {})) for *_, which, r in lines
        ]
        if any(cells):
            columns[column] = cells

    fill("value", lambda model, _: _estimate(model, is_percent))
    if is_percent:
        fill("by token", lambda m, _: _percent(m.get("accuracy_norm")))
        fill("loss", lambda m, _: f"{m['loss']:.3f}")
    fill("model minus this", lambda _, d: _estimate(d, is_percent, "+") if d else "")
    fill("loss minus this", lambda _, d: _estimate(d["loss"], False, "+") if "loss" in d else "")
    fill("McNemar p", lambda _, d: f"{d['p_value']:.2g}" if "p_value" in d else "")
    fill("KL", lambda m, _: f"{m['kl']:.4f}" if "kl" in m else "")
    fill("agree", lambda m, _: _percent(m.get("agreement")))
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in columns:
        is_text = column in ("task", "")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=column != "task")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _estimate(figures: Mapping[str, float], is_percent: bool, sign: str = "") -> str:
    scale, form = (100, f"{sign}.1f") if is_percent else (1, f"{sign}.3f")
    value, low, high = (format(scale * figures[key], form) for key in ("value", "low", "high"))
    return f"{value} \\[{low}, {high}]"  # rich reads a bare bracket as a style


def _positions(name: str, models: Mapping[str, Any]) -> Table:
    table = Table(
        "position", title=f"Perplexity by position, {name}", title_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("tokens", justify="right")
    for which in models:
        table.add_column(which.replace("_", " "), justify="right")
    first = next(iter(models.values()))["buckets"]
    has_teacher = "kl" in first["all"]
    for column in ("KL", "agree") if has_teacher else ():
        table.add_column(column, justify="right")
    for bucket, figures in first.items():
        cells = [bucket, f"{figures['tokens']:,.0f}"]
        cells += [f"{perplexity(m['buckets'][bucket]['nll']):,.3f}" for m in models.values()]
        if has_teacher:
            cells += [f"{figures['kl']:.4f}", _percent(figures["agree"])]
        table.add_row(*cells)
    return table


def show_free_running(console: Console, result: Mapping[str, Any]) -> None:
    """Prints how far a model's own text leads it from its teacher."""
    agreed, excess = (
        f"{mean:.3g} ({low:.3g} to {high:.3g})"
        for mean, low, high in (result["agreed"], result["excess_nll"])
    )
    console.print(
        f"Free running, {result['prompts']} prompts: {agreed} of {result['new_tokens']} greedy "
        f"tokens before the model leaves the teacher's text; the teacher gives the model's samples "
        f"{excess} nats a token less than its own."
    )


def show_lm_eval(console: Console, results: Mapping[str, list[Any]]) -> None:
    """Prints a table of lm-eval's tasks, and the mean of each group where all of it ran."""
    table = Table("lm-eval task", "shots", "metric", box=SIMPLE_HEAD)
    for which in results:
        table.add_column(f"{which.replace('_', ' ')}, %", justify="right")
    columns = list(results.values())
    for rows in zip(*columns, strict=True):
        entry = rows[0]
        shots = "task's own" if entry["shots"] is None else str(entry["shots"])
        table.add_row(entry["task"], shots, entry["metric"], *map(_with_error, rows))
    for group in dict.fromkeys(entry["group"] for entry in columns[0] if entry["group"]):
        means = []
        for column in columns:
            values = [entry["value"] for entry in column if entry["group"] == group]
            means.append(f"{100 * sum(values) / len(values):.1f}")
        table.add_row(f"paper:{group}", "", "mean", *means, style="bold")
    console.print(table)


def _with_error(entry: Mapping[str, Any]) -> str:
    error = entry["stderr"]
    value = f"{100 * entry['value']:.1f}"
    return value if error is None else f"{value} ± {100 * error:.1f}"
