"""What came out of a comparison: means over seeds, paired differences, tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jet_jax.evaluation.statistics import paired_t
from jet_jax.postnas import report
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.json_files import read_json
from jet_jax.postnas.objectives import Objective

Summary = dict[str, Any]
SPEEDS = {
    "train_tokens_s": "training, tokens/s",
    "decode_tokens_s": "decoding, tokens/s",
    "prefill_tokens_s": "prefill, tokens/s",
}
MIB = 2**20


def summarise(
    settings: ComparisonConfig,
    context: ComparisonContext,
    judges: Sequence[Objective],
    teacher: Mapping[str, float],
    results: Mapping[str, Mapping[str, Any]],
) -> Summary:
    """Puts the arms' results together.

    Args:
      settings: of the comparison.
      context: what the arms share.
      judges: the objectives.
      teacher: the teacher's own figures.
      results: by arm, as `comparison` makes them; arms may be missing.

    Returns:
      What was compared, and `arms`: by name, `results` with `figures`: by objective `mean` and `sd`
      over seeds, and `difference`, the mean of arm minus reference over paired seeds with the
      `low` and `high` of its 95 % t interval (None with one seed). Figures are None where a seed
      diverged: a mean over those that are left would flatter the arm.
    """
    values = {name: _values(arm, judges) for name, arm in results.items()}
    base = values.get(settings.reference)
    batch = context.data.batch_size * context.data.seq_len
    arms = {}
    for name, arm in results.items():
        figures = {o.name: _figure(o.name, values[name], base) for o in judges}
        speeds = {key: (arm.get("speeds") or {}).get(key) for key in SPEEDS}
        rates = [x["tokens_per_second"] for x in arm["seeds"].values() if x["tokens_per_second"]]
        speeds["train_tokens_s"] = statistics.median(rates) if rates else None
        arms[name] = {**arm, **speeds, "figures": figures}
    tokens = {name: steps * batch for name, steps in settings.lengths.items()}
    return {
        "reference": settings.reference,
        "path": [int(x) for x in context.path],
        "seeds": list(settings.seeds),
        "tokens": {name.removesuffix("_steps"): count for name, count in tokens.items()},
        "objectives": {
            o.name: {"figure": o.figure, "more_is_better": o.more_is_better} for o in judges
        },
        "tuned_by": {"name": context.tuning.name, "figure": context.tuning.figure},
        "teacher": dict(teacher),
        "arms": arms,
    }


def _values(arm: Mapping[str, Any], judges: Sequence[Objective]) -> dict[str, list[float]] | None:
    """An arm's figures seed by seed; None where a seed has none."""
    found = [run["figures"] for run in arm["seeds"].values()]
    if not found or None in found:
        return None
    return {o.name: [figures[o.name] for figures in found] for o in judges}


def _figure(name: str, values: Any, base: Any) -> dict[str, Any]:
    if values is None:
        return {"mean": None, "sd": None, "difference": None}
    mine = values[name]
    out: dict[str, Any] = {
        "mean": statistics.fmean(mine),
        "sd": statistics.stdev(mine) if len(mine) > 1 else None,
        "difference": None,
    }
    if base is not None and values is not base:
        theirs = base[name]
        out["difference"] = {"mean": statistics.fmean(mine) - statistics.fmean(theirs)}
        interval = paired_t(mine, theirs) if len(mine) > 1 else (None, None, None)
        out["difference"] |= {"low": interval[1], "high": interval[2]}
    return out


def rows(summary: Summary) -> tuple[list[str], list[list[Any]]]:
    """The table: its head, and a row an arm."""
    reference = summary["reference"]
    head = ["block"]
    for name, objective in summary["objectives"].items():
        arrow = "↑" if objective["more_is_better"] else "↓"
        head += [f"{name}: {objective['figure']} {arrow}", f"less {reference} (95 %)"]
    context = next(iter(summary["arms"].values()))["context"]
    head += ["learning rate", "state, elements", "parameters, M", f"cache at {context:,}, MiB"]
    head += [*SPEEDS.values(), f"training, of {reference}'s", "note"]
    base = summary["arms"].get(reference, {}).get("train_tokens_s")
    lines = []
    for name, arm in summary["arms"].items():
        line: list[Any] = [name]
        for figure in arm["figures"].values():
            line += [_with_sd(figure), _interval(figure["difference"])]
        rate = f"{arm['learning_rate']:g}" if arm["learning_rate"] else "–"
        line += [
            f"{rate} (end of those tried)" if arm["at_end"] else rate,
            _number(arm["state_elements"], ","),
            _number(arm["parameters"] / 1e6, ",.2f"),
            _number(arm["cache_bytes"] / MIB, ",.1f"),
            *(_number(arm[key], ",.0f") for key in SPEEDS),
            _number(arm["train_tokens_s"] and base and arm["train_tokens_s"] / base, ".2f"),
            "; ".join(filter(None, (arm["note"], (arm.get("speeds") or {}).get("note")))),
        ]
        lines.append(line)
    return head, lines


def markdown(summary: Summary) -> str:
    """The table in Markdown, and below it how it came about."""
    return f"{report.markdown(*rows(summary))}\n{caption(summary)}\n"


def caption(summary: Summary) -> str:
    """How the figures came about, in words."""
    teacher = ", ".join(f"{name} {x:.4g}" for name, x in summary["teacher"].items())
    tokens = ", ".join(f"{name} {count:,}" for name, count in summary["tokens"].items())
    devices = {arm["speeds"]["device"] for arm in summary["arms"].values() if "speeds" in arm}
    measured = f" Decoding and prefill measured on {', '.join(sorted(devices))}." if devices else ""
    count = len(summary["seeds"])
    return (
        f"Means over {count} seed{'s' * (count > 1)} ± standard deviation. Differences are paired "
        "by seed, with t intervals that are not adjusted for the number of arms. Tokens a run: "
        f"{tokens}. {_rates(summary)} The teacher itself: {teacher}.{measured}"
    )


def _rates(summary: Summary) -> str:
    """Where the arms' learning rates are from."""
    if any(arm["tuned"] for arm in summary["arms"].values()):
        return f"Learning rates by {summary['tuned_by']['figure']} of items set apart."
    arm = next(iter(summary["arms"].values()))
    return f"All arms ran at the one learning rate {arm['learning_rate']:g}."


def html(folder: Path) -> list[str]:
    """A comparison's part of a search's report: table, caption, figures, all results.

    Args:
      folder: of the comparison.

    Raises:
      ValueError: there are no results in it.
    """
    summary = read_json(folder / "results.json")
    if summary is None:
        raise ValueError(f"{folder} holds no results of a comparison")
    pictures = [report.image(path) for path in sorted(folder.glob("*.png"))]
    table = report.table(*rows(summary))
    return [table, report.paragraph(caption(summary)), *pictures,
            report.details("all results", summary)]  # fmt: skip


def _with_sd(figure: Mapping[str, Any]) -> str:
    if figure["mean"] is None:
        return "–"
    spread = "" if figure["sd"] is None else f" ± {figure['sd']:.2g}"
    return f"{figure['mean']:.4g}{spread}"


def _interval(difference: Mapping[str, Any] | None) -> str:
    if difference is None:
        return ""
    if difference["low"] is None:
        return f"{difference['mean']:+.3g}"
    return f"{difference['mean']:+.3g} ({difference['low']:+.3g} to {difference['high']:+.3g})"


def _number(value: Any, style: str) -> str:
    return "–" if value is None else format(value, style)
