"""The figure of a comparison: bars of quality and of speed, an arm each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from jet_jax.postnas.figures import EVEN, INK, LEARNED

SPEEDS = {"decode_tokens_s": "decoding, tokens/s", "train_tokens_s": "training, tokens/s"}


def bars(summary: Mapping[str, Any], path: Path) -> Path:
    """Draws a panel an objective, and one each for decoding and training speed where measured.

    Whiskers are the 95 % t interval of the paired difference from the reference arm, drawn around
    the arm's mean; the reference, coloured, has none. A dotted line is the teacher.

    Args:
      summary: from `comparison_report.summarise`.
      path: the PNG to write.
    """
    arms = summary["arms"]
    speeds = {k: v for k, v in SPEEDS.items() if any(arm[k] is not None for arm in arms.values())}
    count = len(summary["objectives"]) + len(speeds)
    figure, panels = plt.subplots(
        1, count, figsize=(1.6 + 2.4 * count, 1 + 0.32 * len(arms)), squeeze=False, sharey=True,
        layout="constrained",
    )  # fmt: skip
    colors = [LEARNED if name == summary["reference"] else EVEN for name in arms]
    for axes, (name, objective) in zip(panels[0], summary["objectives"].items(), strict=False):
        figures = [arm["figures"][name] for arm in arms.values()]
        means = [f["mean"] for f in figures]
        axes.barh(range(len(arms)), [m or 0 for m in means], color=colors)
        for i, f in enumerate(figures):
            difference = f["difference"]
            if difference and difference["low"] is not None:
                zero = f["mean"] - difference["mean"]
                ends = [zero + difference["low"], zero + difference["high"]]
                axes.plot(ends, [i, i], color=INK, lw=1.2, marker="|", markersize=5)
        shown = [x for x in (*means, summary["teacher"].get(name)) if x is not None]
        if shown:
            low, high = min(shown), max(shown)
            room = 0.25 * (high - low) or 0.1 * abs(high) or 1
            # Bars from 0, unless what they differ by would not be seen then.
            start = low - room if high and (high - low) < 0.3 * abs(high) else min(0, low)
            axes.set_xlim(start, high + room)
        if name in summary["teacher"]:
            axes.axvline(summary["teacher"][name], color=INK, lw=1, ls=":")
        better = "more" if objective["more_is_better"] else "less"
        axes.set_xlabel(f"{name}: {objective['figure']}\n({better} is better)", fontsize=9)
    for axes, (key, label) in zip(panels[0][-len(speeds) or count :], speeds.items(), strict=False):
        axes.barh(range(len(arms)), [arm[key] or 0 for arm in arms.values()], color=colors)
        axes.set_xlabel(label, fontsize=9)
    panels[0][0].set_yticks(range(len(arms)), list(arms))
    panels[0][0].invert_yaxis()
    for axes in panels[0]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path
