"""The picture of a run: training and validation loss over steps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from jet_jax.metrics import read_records

INK, TRAIN, VALID = "#333333", "#9ab8d9", "#c1440e"


def plot_loss(workdir: str | os.PathLike, reference: float | None = None) -> Path | None:
    """Draws `loss_curve.png` from a run's records; with a teacher, its KL stands for the loss.

    Args:
      workdir: the run's directory.
      reference: loss of a model that knows only token frequencies, drawn as a line.

    Returns:
      The picture's path; None if there are no training records.
    """
    train, valid = (read_records(workdir, kind) for kind in ("train", "valid"))
    if not train:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    steps, loss = (np.array([r[key] for r in train]) for key in ("step", "loss"))
    # A run with a teacher trains on another loss than the next token's.
    distilled = "mse" in train[-1] or "kl" in train[-1] or "ce" in train[-1]
    label = "training, distillation loss" if distilled else "training"
    axes.plot(steps, loss, color=TRAIN, linewidth=1.5, label=label)
    if valid:
        name = "kl" if distilled else "loss"
        label = "validation, KL to the teacher" if distilled else "validation"
        x, y = (np.array([r[key] for r in valid]) for key in ("step", name))
        axes.plot(x, y, color=VALID, linewidth=2, marker="o", markersize=4, label=label)
        axes.annotate(f"{y[-1]:.3f}", (x[-1], y[-1]), xytext=(0, 8), textcoords="offset points",
                      ha="right", color=VALID)  # fmt: skip
    if reference is not None and not distilled:
        axes.axhline(reference, color=INK, linewidth=1, linestyle=":")
        axes.annotate("token frequencies alone", (steps[-1], reference), xytext=(0, 4),
                      textcoords="offset points", ha="right", color=INK, fontsize=8)  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("loss" if distilled else "loss, nats a token")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    path = Path(workdir) / "loss_curve.png"
    figure.savefig(path)
    plt.close(figure)
    return path
