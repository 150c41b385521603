"""The figures of docs/blocks.md.

    python benchmarks/plot_blocks.py [OUT.json] [--folder docs]

Without OUT.json: blocks_cost.png, what a token costs in each block by the size of its state,
counted and not measured. With the OUT.json of benchmarks/blocks.py: blocks_measured.png, training
tokens/s and the decoding step's time by block.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from jet_jax.bench import blocks  # noqa: E402

INK, OURS, PEER = "#333333", "#c1440e", "#9ab8d9"
COLOURS = {
    "retnet": "#8a8a8a",
    "gla": "#4f7fb5",
    "mamba2": "#2d9d78",
    "deltanet": "#e0a100",
    "gdn": "#c1440e",
    "jet": "#7b1e3a",
    "kda": "#7d5ba6",
    "rwkv7": "#1d1d1d",
}
DASHED = ("gla", "gdn")  # lie on RetNet and DeltaNet
HEADS = (3, 4, 6, 8, 9, 12, 16, 18, 24, 36)
STATE_SIZES = (24, 48, 96, 192)  # of Mamba2, whose heads share their keys


def resized(block: blocks.Block) -> list[blocks.Block]:
    """The block with other states, its rows of keys and values as wide as they are.

    Fewer, wider heads make a larger state; every block keeps its parameters but Mamba2, whose B and
    C widen.
    """
    heads, key, value = block.state_shape

    def with_options(**options: Any) -> blocks.Block:
        known = block.options
        return dataclasses.replace(block, options={k: options.get(k, x) for k, x in known.items()})

    if block.name == "mamba2":
        return [with_options(state_size=size) for size in STATE_SIZES]
    return [
        with_options(num_heads=count, head_dim=heads * key // count)
        for count in HEADS
        if heads * key % count == 0 and heads * value % count == 0
    ]


def tidy(axes: Axes) -> None:
    """The project's look of an axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def plot_cost(path: Path) -> None:
    """Draws multiply-adds and bytes a token against the state's size; circles at the search's."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4.4), dpi=150, layout="constrained", sharex=True
    )
    for block in blocks.all_blocks():
        style: dict[str, Any] = {"color": COLOURS[block.name], "linewidth": 1.8}
        style["linestyle"] = (0, (3, 3)) if block.name in DASHED else "-"
        sizes = sorted(resized(block), key=lambda b: b.state_elements)
        x = [b.state_elements for b in sizes]
        left.plot(x, [b.recurrence_products() / 1e6 for b in sizes], **style, label=block.name)
        right.plot(x, [b.token_bytes() / 1e3 for b in sizes], **style)
        marker: dict[str, Any] = {"marker": "o", "color": COLOURS[block.name], "markersize": 6}
        left.plot(block.state_elements, block.recurrence_products() / 1e6, **marker)
        right.plot(block.state_elements, block.token_bytes() / 1e3, **marker)
    left.set_ylabel(f"million multiply-adds a token, chunks of {blocks.CHUNK}")
    right.set_ylabel("kB a token in and out, bfloat16, forward")
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("state elements a layer")
        tidy(axes)
    left.legend(frameon=False, ncols=2)
    figure.suptitle(
        f"The recurrence of each block at width {blocks.WIDTH}, counted; circles: equal states",
        fontsize=10,
    )
    figure.savefig(path)
    plt.close(figure)


def layer_rates(report: dict[str, Any]) -> dict[str, dict[tuple[str, str], float]]:
    """Training tokens/s by size, then by block and "ours" (the faster) or "torch"."""
    out: dict[str, dict[tuple[str, str], float]] = {}
    for name, facts in report["blocks"].items():
        for side, found in facts["sides"].items():
            for r in found["results"]:
                if r["op"] == "layer" and r["name"].endswith("-grad") and r["tokens_s"]:
                    size = " ".join(f"{dim}{n}" for dim, n in r["sizes"].items())
                    of, key = out.setdefault(size, {}), (name, _whose(side))
                    of[key] = max(r["tokens_s"], of.get(key, 0.0))
    return out


def _whose(side: str) -> str:
    return "torch" if side == "torch" else "ours"


def step_times(report: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """The fastest implementation's time of a decoding step and its floor by block, in µs."""
    out = {}
    for name, facts in report["blocks"].items():
        found = (r for side in facts["sides"].values() for r in side["results"])
        timed = [r for r in found if r["op"] != "layer" and r["ms"]]
        if timed:
            best = min(timed, key=lambda r: r["ms"])
            out[name] = 1e3 * best["ms"], 1e3 * best["floor_ms"]
    return out


def plot_measured(report: dict[str, Any], path: Path) -> None:
    """Draws a panel of bars for each size of the layer and one for the decoding step.

    Raises:
      ValueError: the report has no measured layer.
    """
    rates, steps = layer_rates(report), step_times(report)
    if not rates:
        raise ValueError("no layer's time is in the file; run benchmarks/blocks.py first")
    count = len(rates) + bool(steps)
    figure, panels = plt.subplots(
        1, count, figsize=(4.6 * count, 4), dpi=150, layout="constrained", squeeze=False
    )
    for axes, (size, of) in zip(panels[0], rates.items(), strict=False):
        names = list(dict.fromkeys(name for name, _ in of))
        for side, shift, colour, label in (
            ("ours", -0.2, OURS, "this project"),
            ("torch", 0.2, PEER, "flash-linear-attention"),
        ):
            x = [i + shift for i, name in enumerate(names) if (name, side) in of]
            y = [of[name, side] / 1e3 for name in names if (name, side) in of]
            axes.bar(x, y, 0.38, color=colour, label=label if y else None)
        axes.set_xticks(range(len(names)), names, rotation=30)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylabel("thousand tokens/s, training")
        axes.set_title(f"one layer, {size}", fontsize=10)
        tidy(axes)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    if steps:
        axes = panels[0][-1]
        axes.bar(range(len(steps)), [time for time, _ in steps.values()], 0.6, color=OURS)
        for i, (_, floor) in enumerate(steps.values()):
            axes.plot([i - 0.4, i + 0.4], [floor, floor], color=INK, linewidth=1.5)
        axes.set_xticks(range(len(steps)), list(steps), rotation=30)
        axes.set_ylabel("µs")
        axes.set_title("one decoding step; lines: the state's traffic", fontsize=10)
        tidy(axes)
    devices = {
        found["start"]["device"]
        for facts in report["blocks"].values()
        for found in facts["sides"].values()
        if found["start"]
    }
    figure.suptitle(", ".join(sorted(devices)), fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"--folder {args.folder} is no directory")
    if args.out is None:
        path = args.folder / "blocks_cost.png"
        plot_cost(path)
    else:
        if not args.out.is_file():
            parser.error(f"{args.out} does not exist; benchmarks/blocks.py writes it")
        path = args.folder / "blocks_measured.png"
        try:
            plot_measured(json.loads(args.out.read_text(encoding="utf-8")), path)
        except ValueError as error:
            parser.error(f"{args.out}: {error}")
    print(path)


if __name__ == "__main__":
    main()
