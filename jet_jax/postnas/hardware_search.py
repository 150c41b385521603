"""The hardware-aware search: shapes of one cache size, their measured speed and their quality.

A row is a dict: "shape", what `measure` returned, and the scores of a run trained at that shape.
What trains them is not here. Source: Jet-Nemotron (arXiv 2508.15884) §2.5, which states no rule of
choice; the one of `choose` picks the paper's 96-256-12 from the paper's numbers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jet_jax.option_checks import Number, require
from jet_jax.postnas.measuring import measure
from jet_jax.postnas.shapes import Shape, check_shapes, grid, shape_of, shaped

__all__ = [
    "Choice",
    "Shape",
    "check_shapes",
    "choose",
    "grid",
    "measure",
    "pareto",
    "plot",
    "shape_of",
    "shaped",
    "table",
]

Row = dict[str, Any]
OBJECTIVES = {"math": True, "retrieval": True}  # name: whether more is better
INK, POINT, CHOSEN = "#333333", "#9ab8d9", "#c1440e"


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `choose` found.

    Attributes:
      index: the chosen row's.
      scores: each row's mean z-score, None where it took no part.
      by_objective: each objective's own best row among those fast enough.
      dropped: why a row took no part, by index.
      rule: the rule in words.
    """

    index: int
    scores: tuple[float | None, ...]
    by_objective: dict[str, int]
    dropped: dict[int, str]
    rule: str


def pareto(points: Sequence[Row], better: Mapping[str, bool]) -> list[Row]:
    """The points that no other one equals or beats in everything and beats in something.

    Args:
      points: rows; those where one of the values is missing or None are left out.
      better: names of values, each with whether more is better.

    Returns:
      The front, in the order of `points`; of equal points all.
    """
    whole = [p for p in points if all(p.get(name) is not None for name in better)]
    values = [[p[name] if more else -p[name] for name, more in better.items()] for p in whole]

    def beaten(mine: list[Any]) -> bool:
        return any(
            other != mine and all(x >= y for x, y in zip(other, mine, strict=True))
            for other in values
        )

    return [p for p, mine in zip(whole, values, strict=True) if not beaten(mine)]


def choose(
    rows: Sequence[Row],
    throughput: str = "decode_tokens_s",
    tolerance: Number = 0.98,
    objectives: Mapping[str, bool] = OBJECTIVES,
) -> Choice:
    """Chooses a shape: of those about as fast as the fastest the best on average.

    Rows below `tolerance` times the best throughput are dropped. Over the rest each objective
    becomes a z-score (0 where all are equal), signed so that more is better, and the highest mean
    of these wins, the earlier row at a tie.

    Args:
      rows: the candidates.
      throughput: name of the speed, higher being better.
      tolerance: fraction of the best speed that a row must reach, above 0 and at most 1.
      objectives: names of the scores, each with whether more is better.

    Raises:
      ValueError: no row has a throughput, a row that is fast enough lacks a score, or there are
        no objectives.
    """
    require(len(objectives) >= 1, "choose needs at least one objective")
    require(0 < tolerance <= 1, f"tolerance={tolerance} must be above 0 and at most 1")
    speeds = {i: row[throughput] for i, row in enumerate(rows) if row.get(throughput) is not None}
    require(len(speeds) >= 1, f"no row has a {throughput!r} to compare")
    fastest = max(speeds.values())
    dropped = {}
    for i, row in enumerate(rows):
        if i not in speeds:
            dropped[i] = row.get("note") or f"no {throughput}"
        elif speeds[i] < tolerance * fastest:
            dropped[i] = f"{speeds[i] / fastest:.3f} of the best {throughput}, under {tolerance}"
    kept = [i for i in range(len(rows)) if i not in dropped]
    totals = dict.fromkeys(kept, 0.0)
    by_objective = {}
    for name, more in objectives.items():
        for i in kept:
            value = rows[i].get(name)
            require(
                value is not None and math.isfinite(value),
                f"row {i} ({rows[i].get('shape')}) has {name}={value}; a number is needed",
            )
        values = [float(rows[i][name]) * (1 if more else -1) for i in kept]
        mean, deviation = statistics.fmean(values), statistics.pstdev(values)
        for i, value in zip(kept, values, strict=True):
            totals[i] += (value - mean) / deviation / len(objectives) if deviation else 0.0
        by_objective[name] = kept[values.index(max(values))]
    return Choice(
        index=max(kept, key=lambda i: totals[i]),
        scores=tuple(totals.get(i) for i in range(len(rows))),
        by_objective=by_objective,
        dropped=dropped,
        rule=f"{throughput} at least {tolerance} of the best, then the highest mean of the "
        f"z-scores of {' and '.join(_labels(objectives))}",
    )


def table(
    rows: Sequence[Row],
    choice: Choice,
    throughput: str = "decode_tokens_s",
    objectives: Mapping[str, bool] = OBJECTIVES,
) -> str:
    """A Markdown table of the rows, the chosen one in bold, and the rule and single bests below.

    Cache is that of the whole batch. A cell is empty where the row has no such value.
    """
    labels = _labels(objectives)
    columns: list[tuple[str, str, float, str]] = [
        ("parameters", "parameters (M)", 1e-6, ",.1f"),
        ("cache_bytes", "cache (MiB)", 2**-20, ",.1f"),
        (throughput, throughput, 1, ",.0f"),
        ("prefill_tokens_s", "prefill_tokens_s", 1, ",.0f"),
        *((name, label, 1, ".3f") for name, label in zip(objectives, labels, strict=True)),
        ("score", "mean z", 1, "+.2f"),
    ]
    lines = [
        f"| shape (K-V-heads) | {' | '.join(c[1] for c in columns)} | note |",
        f"|---|{'--:|' * len(columns)}---|",
    ]
    for i, row in enumerate(rows):
        row: Row = {**row, "score": choice.scores[i]}
        cells = [str(row.get("shape", i))]
        for name, _, factor, style in columns:
            value = row.get(name)
            cells.append("" if value is None else f"{value * factor:{style}}")
        cells.append(choice.dropped.get(i) or row.get("note") or "")
        if i == choice.index:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    bests = (f"by {name} alone {_name(rows, i)}" for name, i in choice.by_objective.items())
    chosen = f"Chosen: {_name(rows, choice.index)} ({choice.rule}); {'; '.join(bests)}."
    return "\n".join([*lines, "", chosen]) + "\n"


def _labels(objectives: Mapping[str, bool]) -> list[str]:
    """The objectives' names with arrows to where better is."""
    return [f"{name} {'↑' if more else '↓'}" for name, more in objectives.items()]


def _name(rows: Sequence[Row], index: int) -> str:
    return str(rows[index].get("shape", index))


def plot(
    rows: Sequence[Row],
    path: str | os.PathLike,
    choice: Choice | None = None,
    throughput: str = "decode_tokens_s",
    objectives: Mapping[str, bool] = OBJECTIVES,
) -> Path:
    """Draws throughput against each objective, with the front and the choice marked.

    Args:
      rows: the candidates; those without throughput or score are left out.
      path: the picture to write; its ending names the format.
      choice: from `choose`, by default with the same arguments.
      throughput: as for `choose`.
      objectives: as for `choose`, one panel each.

    Returns:
      The picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if choice is None:
        choice = choose(rows, throughput, objectives=objectives)
    width = 4.8 * len(objectives)
    figure, panels = plt.subplots(
        1, len(objectives), figsize=(width, 4), dpi=150, layout="constrained", squeeze=False
    )
    named = zip(objectives.items(), _labels(objectives), strict=True)
    for axes, ((name, more), label) in zip(panels[0], named, strict=True):
        front = pareto(rows, {throughput: True, name: more})
        front.sort(key=lambda row: row[throughput])
        axes.plot(*([row[key] for row in front] for key in (throughput, name)), color=INK,
                  linewidth=1, linestyle=":", label="front")  # fmt: skip
        for i, row in enumerate(rows):
            if row.get(throughput) is None or row.get(name) is None:
                continue
            at, chosen = (row[throughput], row[name]), i == choice.index
            color, size, legend = (CHOSEN, 9, "chosen") if chosen else (POINT, 6, None)
            faded = 0.4 if i in choice.dropped else 1.0
            axes.plot(*at, "o", color=color, markersize=size, alpha=faded, label=legend)
            axes.annotate(_name(rows, i), at, xytext=(0, 7), textcoords="offset points",
                          ha="center", fontsize=7, color=CHOSEN if chosen else INK)  # fmt: skip
        axes.set_xlabel(throughput)
        axes.set_ylabel(label)
        axes.margins(0.15)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
    panels[0][0].legend(frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path
