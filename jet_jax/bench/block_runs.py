"""Measures blocks: rows of block_rows.py, one block after the other, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jet_jax.bench import kernels
from jet_jax.bench.block_rows import Layer, layer_rows, step_row
from jet_jax.bench.blocks import BASE, Block
from jet_jax.bench.kernels import Result
from jet_jax.bench.timing import Ceilings

HOW = (
    "Tokens/s are those of one layer's mixer in bfloat16, forward plus the gradients of its input "
    "and all parameters, without remat; the paper's ratios are of whole models. `of floor` counts "
    "its products with weights and the chunked recurrence's, three times with gradients. A layer's "
    "error is that of y and of the input's gradient beside the same layer in float32, token by "
    "token; a step's floor moves the float32 state in and out once, with the token's rows."
)


def run(
    blocks: Sequence[Block],
    implementations: Sequence[str],
    ceilings: Ceilings,
    repeats: int,
    *,
    small: bool,
    quick: bool = False,
) -> Iterator[Result]:
    """Measures layers and decoding steps; each block is compiled when its turn comes.

    Args:
      blocks: what to run.
      implementations: "pallas", "xla": of the decoding step, and of those operations of the
        layer that have it.
      ceilings: rates that floors follow from.
      repeats: as for `median_seconds`.
      small: sizes for a CPU.
      quick: training at one size and the step only.

    Yields:
      What `kernels.run` yields, with `block`, and for layers `tokens_s` and `kernels` (the names
      of the Pallas kernels in the program; None where it cannot be traced).
    """
    for block in blocks:
        rows = layer_rows(block, small, quick)
        by_name = {row.name: row for row in rows}
        for result in kernels.run(rows, implementations, ceilings, repeats):
            row, ms = by_name[result["name"]], result["ms"]
            names = kernel_names(row, result["implementation"])
            rate = None if ms is None else 1e3 * row.tokens / ms
            yield result | {"block": block.name, "tokens_s": rate, "kernels": names}
        for result in kernels.run([step_row(block, small)], implementations, ceilings, repeats):
            yield result | {"block": block.name}


def num_results(block: Block, implementations: Sequence[str], small: bool, quick: bool) -> int:
    """How many results `run` yields for a block."""
    return (len(layer_rows(block, small, quick)) + 1) * len(implementations)


def kernel_names(row: Layer, implementation: str) -> list[str] | None:
    """Names of the Pallas kernels of a row's program, sorted; None if it cannot be traced."""
    try:
        shapes = jax.eval_shape(row.inputs, jax.random.key(0))
        jaxpr = jax.make_jaxpr(row.function(implementation))(*shapes)
    except Exception:  # why is told by the result's note
        return None
    return sorted(_pallas_names(jaxpr.jaxpr))


def _pallas_names(jaxpr: Any) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            names.add(str(equation.params["name"]))
            continue
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                names |= _pallas_names(inner)
    return names


def ratios(results: Sequence[Result]) -> dict[str, float]:
    """Training tokens/s of each layer over Gated DeltaNet's at the same size, each at its fastest.

    Returns:
      "block, size" to the ratio; only where both were measured.
    """
    rates: dict[tuple[str, str], float] = {}
    for r in results:
        if r["op"] == "layer" and r["name"].endswith("-grad") and r["tokens_s"]:
            key = r["block"], size_name(r)
            rates[key] = max(r["tokens_s"], rates.get(key, 0.0))
    return {
        f"{name}, {size}": rate / rates[BASE, size]
        for (name, size), rate in rates.items()
        if (BASE, size) in rates
    }


def size_name(result: Result) -> str:
    """ "B8 T4096"."""
    return " ".join(f"{dim}{size}" for dim, size in result["sizes"].items())
