"""The hardware-aware search as a comparison: arms are shapes of one cache size.

Speed is measured, quality comes from the same short conversions as for blocks, and
`hardware_search.choose` decides: of the shapes about as fast as the fastest the one with the best
mean of z-scores. Source: arXiv 2508.15884 §2.5, table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jet_jax.option_checks import Number, require
from jet_jax.postnas.arms import arm_options
from jet_jax.postnas.comparison import compare
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.hardware_search import Row, choose, pareto, plot, table
from jet_jax.postnas.json_files import write_json
from jet_jax.postnas.shapes import Shape, shape_of

THROUGHPUT = "decode_tokens_s"


def compare_shapes(
    settings: ComparisonConfig,
    folder: Path,
    context: ComparisonContext,
    tolerance: Number = 0.98,
) -> dict[str, Any]:
    """Compares shapes and chooses one.

    Writes beside what `compare` writes `choice.md`, `choice.json` and `shapes.png`, throughput
    against each objective.

    Args:
      settings: whose arms are of one kind and keep equally much, as `arms.shape_arms` makes them,
        and are measured.
      folder: what it writes to.
      context: what all arms share.
      tolerance: fraction of the best decoding speed that a shape must reach.

    Returns:
      `shape`, its `arm` and that one's `options`, `rule`, `by_objective` (the best shape of each
      alone), `front` (by objective, against throughput), `dropped`, and `comparison`, the whole
      result.

    Raises:
      ValueError: arms of several kinds or cache sizes, or without measured speed; no shape that is
        fast enough has a score; and as `compare`.
    """
    shapes = check_shape_arms(settings, context)
    summary = compare(settings, folder, context)
    rows = rows_of(summary, shapes)
    objectives = {name: x["more_is_better"] for name, x in summary["objectives"].items()}
    scored = [row for row in rows if all(row[name] is not None for name in objectives)]
    require(bool(scored), "no shape could be trained, so there is nothing to choose from")
    choice = choose(scored, THROUGHPUT, tolerance, objectives)
    names = [row["shape"] for row in scored]
    out = {
        "shape": names[choice.index],
        "arm": scored[choice.index]["arm"],
        "options": summary["arms"][scored[choice.index]["arm"]]["options"],
        "rule": choice.rule,
        "by_objective": {name: names[i] for name, i in choice.by_objective.items()},
        "front": {
            name: [row["shape"] for row in pareto(scored, {THROUGHPUT: True, name: more})]
            for name, more in objectives.items()
        },
        "dropped": {names[i]: reason for i, reason in choice.dropped.items()},
    }
    write_json(folder / "choice.json", out)
    text = table(scored, choice, THROUGHPUT, objectives)
    (folder / "choice.md").write_text(text, encoding="utf-8")
    plot(scored, folder / "shapes.png", choice, THROUGHPUT, objectives)
    return out | {"comparison": summary}


def check_shape_arms(settings: ComparisonConfig, context: ComparisonContext) -> dict[str, Shape]:
    """The shape of each arm.

    Raises:
      ValueError: arms of several kinds or cache sizes, or without measured speed.
    """
    require(settings.measure is not None, "shapes are chosen by speed: measure must not be None")
    kinds = {arm.kind for arm in settings.arms.values()}
    require(len(kinds) == 1, f"shapes are compared for one kind of layer, not for {sorted(kinds)}")
    kind, teacher = next(iter(kinds)), context.teacher.config
    shapes = {}
    for name, arm in settings.arms.items():
        options = arm_options(teacher, name, arm)
        config = teacher.replace(layer_types=(kind,), mixers={kind: options}, hf_json=None)
        shapes[name] = shape_of(config, kind)
    sizes = {name: shape.product for name, shape in shapes.items()}
    require(
        len(set(sizes.values())) == 1,
        "shapes are compared at one cache size, but their states have "
        + ", ".join(f"{size:,} ({name})" for name, size in sizes.items()),
    )
    return shapes


def rows_of(summary: Mapping[str, Any], shapes: Mapping[str, Shape]) -> list[Row]:
    """The arms as `hardware_search` takes them, with means over seeds."""
    rows = []
    for name, arm in summary["arms"].items():
        row: Row = {"arm": name, "shape": str(shapes[name])}
        keys = ("parameters", "cache_bytes", THROUGHPUT, "prefill_tokens_s")
        row |= {key: arm[key] for key in keys}
        row["note"] = arm["speeds"]["note"] or arm["note"]
        row |= {name: figure["mean"] for name, figure in arm["figures"].items()}
        rows.append(row)
    return rows
