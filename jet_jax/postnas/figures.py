"""The search's figures: heat map, placement curve, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt

INK, LEARNED, EVEN = "#333333", "#c1440e", "#9ab8d9"


def heat_map(
    values: Mapping[str, Sequence[float]],
    better: Mapping[str, bool],
    chosen: Sequence[int],
    path: Path,
) -> Path:
    """Draws one row an objective and one cell a layer, darker being better; chosen layers framed.

    Args:
      values: figures by objective and layer.
      better: whether more of it is better.
      chosen: layers that keep their attention, from 0.
      path: the PNG to write.
    """
    names, layers = list(values), len(next(iter(values.values())))
    rows = np.array([np.asarray(values[n]) * (1 if better[n] else -1) for n in names])
    low, high = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    shades = (rows - low) / np.maximum(high - low, 1e-12)
    figure, axes = plt.subplots(figsize=(max(5, 0.42 * layers + 2), 1.1 + 0.5 * len(names)))
    axes.imshow(shades, cmap="Oranges", vmin=0, vmax=1.15, aspect="auto")
    for i, name in enumerate(names):
        for j, value in enumerate(values[name]):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=INK)
    for layer in chosen:
        box = plt.Rectangle((layer - 0.5, -0.5), 1, len(names), fill=False, edgecolor=INK, lw=1.6)
        axes.add_patch(box)
    axes.set_yticks(range(len(names)), names)
    axes.set_xticks(range(layers), [str(i) for i in range(layers)])
    axes.set_xlabel("the one layer that keeps its attention, all others linear (framed: chosen)")
    return _save(figure, path)


def curve(rows: Sequence[Mapping[str, Any]], figure_name: str, path: Path) -> Path:
    """Draws the learned placement and the range of uniform ones over the number of layers.

    Args:
      rows: from `Placement.curve`.
      figure_name: what is measured, for the axis.
      path: the PNG to write.
    """
    counts = [row["count"] for row in rows]
    even = [list(row["uniform"].values()) for row in rows]
    figure, axes = plt.subplots(figsize=(5, 3.2))
    axes.plot(counts, [r["learned"] for r in rows], "o-", color=LEARNED, label="searched")
    axes.plot(counts, [np.mean(x) for x in even], "s--", color=EVEN, label="uniform, mean")
    axes.fill_between(counts, [min(x) for x in even], [max(x) for x in even], color=EVEN, alpha=0.3)
    axes.set_xlabel("layers with full attention")
    axes.set_ylabel(figure_name)
    axes.set_xticks(counts)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _save(figure, path)


def losses(stages: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> Path:
    """Draws the training losses of the stages side by side."""
    figure, all_axes = plt.subplots(
        1, len(stages), figsize=(4.5 * len(stages), 3), squeeze=False, layout="constrained"
    )
    for axes, (name, records) in zip(all_axes[0], stages.items(), strict=True):
        axes.plot([r["step"] for r in records], [r["loss"] for r in records], color=LEARNED, lw=1)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_yscale("log")
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=140, bbox_inches="tight")
    plt.close(figure)
    return path
