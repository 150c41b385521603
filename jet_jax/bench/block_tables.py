"""The tables of `jet-jax bench blocks`, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from jet_jax.bench.block_runs import ratios, size_name
from jet_jax.bench.blocks import Block
from jet_jax.bench.kernels import Result


def sizes_table(blocks: Sequence[Block]) -> Table:
    """What is equal and what is not: state, parameters, and a token's work."""
    table = _table(
        f"Blocks at width {blocks[0].width}",
        ("block", "operation", "state H×K×V"),
        ("elements", "parameters", "million multiply-adds: weights", "recurrence"),
    )
    for block in blocks:
        table.add_row(
            block.name,
            block.form.op,
            state_name(block),
            f"{block.state_elements:,}",
            f"{block.param_count:,}",
            f"{block.projection_products() / 1e6:.3g}",
            f"{block.recurrence_products() / 1e6:.3g}",
        )
    return table


def layers_table(title: str, blocks: Sequence[Block], results: Sequence[Result]) -> Table:
    """A row a block, size and implementation: training, the paper's ratio, the forward pass."""
    table = _table(
        title,
        ("block", "size", ""),
        ("tokens/s", "of gdn", "paper", "ms", "of floor", "forward ms", "error"),
    )
    by_name = {(r["name"], r["implementation"]): r for r in results}
    facts = {block.name: block.facts() for block in blocks}
    fastest = ratios(results)
    last = None
    for r in results:
        if r["op"] != "layer" or not r["name"].endswith("-grad"):
            continue
        name, size = r["block"], size_name(r)
        forward = by_name.get((r["name"].removesuffix("-grad"), r["implementation"]))
        best = max((x["tokens_s"] or 0.0 for x in results if x["name"] == r["name"]), default=0.0)
        ratio = fastest.get(f"{name}, {size}") if r["tokens_s"] == best else None
        table.add_row(
            "" if name == last else name,
            size,
            r["implementation"],
            number(r["tokens_s"], ",.0f"),
            number(ratio, ".2f"),
            "" if name == last else number(facts[name]["paper_ratio"], ".2f"),
            number(r["ms"], ",.3f"),
            "" if r["ms"] is None else f"{100 * r['fraction_of_floor']:.0f} %",
            "" if forward is None else forward["note"] or number(forward["ms"], ",.3f"),
            r["note"] or number(r["error"], ".1e"),
        )
        last = name
    return table


def steps_table(blocks: Sequence[Block], results: Sequence[Result]) -> Table:
    """A row a block and implementation: the decoding step beside its floor."""
    table = _table(
        "One decoding step of the recurrence (20 in a program, the state donated)",
        ("block", "batch", "state H×K×V", ""),
        ("ms", "GB/s", "floor ms", "of floor", "error"),
    )
    states = {block.name: state_name(block) for block in blocks}
    for r in results:
        if r["op"] == "layer":
            continue
        times = None if r["ms"] is None else r["ms"] / r["floor_ms"]
        table.add_row(
            r["block"],
            size_name(r),
            states[r["block"]],
            r["implementation"],
            number(r["ms"], ",.4f"),
            number(r["gb_s"], ",.0f"),
            number(r["floor_ms"], ",.4f"),
            "" if times is None else f"{times:.2f}×",
            r["note"] or number(r["error"], ".1e"),
        )
    return table


def state_name(block: Block) -> str:
    """ "4×192×384"."""
    return "×".join(str(size) for size in block.state_shape)


def number(value: float | None, form: str) -> str:
    """Formats a number; None is empty."""
    return "" if value is None else format(value, form)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(*left, title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in right:
        table.add_column(column, justify="right")
    return table
