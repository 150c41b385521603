"""Measures rows of rows.py: time, rates, fraction of the floor and error, by implementation."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jet_jax.bench.rows import QUICK, Function, Row
from jet_jax.bench.timing import Ceilings, median_seconds

Result = dict[str, Any]
KEY = jax.eval_shape(lambda: jax.random.key(0))


def choose(rows: Sequence[Row], patterns: Sequence[str], quick: bool) -> list[Row]:
    """Picks rows by name.

    Args:
      rows: all of them.
      patterns: names, or shell patterns such as "step*"; none picks all, or the quick ones.
      quick: without patterns, pick a handful.

    Raises:
      ValueError: a pattern fits no name.
    """
    names = [row.name for row in rows]
    patterns = list(patterns) or (list(QUICK) if quick else ["*"])
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no row is called {pattern!r}; there are {', '.join(names)}")
    return [row for row in rows if any(fnmatch.fnmatch(row.name, p) for p in patterns)]


def relative_errors(got: Any, expected: Any) -> list[float]:
    """Relative Frobenius error of each array, in float32."""

    def one(x, y):
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))

    return [one(x, y) for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)]


def _compile(function: Function, inputs: Sequence[Any], donated: tuple[int, ...] = ()) -> Any:
    """Returns the compiled function, or one line about why there is none."""
    try:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
        return jax.jit(function, donate_argnums=donated).lower(*shapes).compile()
    except Exception as error:  # a row that does not compile is a line of the table, not its end
        return _one_line(error)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "out of memory" if "RESOURCE_EXHAUSTED" in text else text[:200]


def run(
    rows: Sequence[Row], implementations: Sequence[str], ceilings: Ceilings, repeats: int
) -> Iterator[Result]:
    """Measures every row with every implementation.

    Programs are compiled beside each other first, since compiling takes most of the time.

    Args:
      rows: what to run.
      implementations: names that the operations know.
      ceilings: rates that floors follow from.
      repeats: as for `median_seconds`.

    Yields:
      One result a row and implementation: `name`, `op`, `what`, `sizes`, `implementation`,
      `bytes`, `flops`, `floor_ms`, and `ms`, `gb_s`, `tflop_s`, `fraction_of_floor` (floor over
      time), `error` (the largest relative Frobenius error of an output or gradient against the
      "reference" implementation in float32, at the sizes `error_at`) and `note`; those that could
      not be measured are None, and `note` says why.
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs = {}
        for row in rows:
            small = row.small()
            for each in (row, small):
                jobs["inputs", each.input_key] = pool.submit(_compile, each.inputs, (KEY,))
            for implementation in (*implementations, "reference"):
                job = (row.op, small.what, str(small.sizes), implementation)
                if job not in jobs:
                    inputs = jax.eval_shape(small.inputs, jax.random.key(0))
                    if implementation == "reference":
                        inputs = _as_float32(inputs)
                    jobs[job] = pool.submit(_compile, small.function(implementation), inputs)
                if implementation != "reference":
                    shapes = jax.eval_shape(row.inputs, jax.random.key(0))
                    function = row.function(implementation)
                    jobs[row.name, implementation] = pool.submit(
                        _compile, function, shapes, row.donated
                    )
        for row in rows:
            for implementation in implementations:
                small = row.small()
                checks = [
                    jobs[row.op, small.what, str(small.sizes), name]
                    for name in (implementation, "reference")
                ]
                # Compilers share the host with the dispatch that is timed, so they finish first.
                for job in jobs.values():
                    job.result()
                compiled = jobs[row.name, implementation].result()
                result = _describe(row, implementation, ceilings)
                programs = [compiled, *(check.result() for check in checks)]
                inputs = [jobs["inputs", each.input_key].result() for each in (row, small)]
                yield result | _measure(row, programs, inputs, result, repeats)


def _as_float32(inputs: Any) -> Any:
    """Widens arrays or shapes."""

    def widen(x):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32)
        return x.astype(jnp.float32)

    return jax.tree.map(widen, inputs)


def _describe(row: Row, implementation: str, ceilings: Ceilings) -> Result:
    """What is known before running."""
    work = {"bytes": row.num_bytes(), "flops": row.flops()}
    return {
        "name": row.name,
        "op": row.op,
        "what": row.what,
        "sizes": row.sizes,
        "implementation": implementation,
        **work,
        "floor_ms": 1e3 * ceilings.floor_seconds(*work.values()),
        "error_at": row.small().sizes,
    }


def _measure(
    row: Row, programs: list[Any], inputs: list[Any], facts: Result, repeats: int
) -> Result:
    """Times the compiled row and compares its small companion with the reference.

    Args:
      row: what is measured.
      programs: the row, its small companion and the reference of that, compiled.
      inputs: compiled, what makes the inputs of the row and of the small one.
      facts: of the row.
      repeats: as for `median_seconds`.

    Returns:
      The measured part of a result.
    """
    missing = dict.fromkeys(("ms", "gb_s", "tflop_s", "fraction_of_floor", "error"))
    for program in (*programs, *inputs):
        if isinstance(program, str):
            return missing | {"note": program}
    compiled, small, reference = programs
    try:
        checked = inputs[1](jax.random.key(1))
        errors = relative_errors(small(*checked), reference(*_as_float32(checked)))
        del checked
        each = seconds(row, compiled, repeats, inputs[0])
    except jax.errors.JaxRuntimeError as failure:
        return missing | {"note": _one_line(failure)}
    return {
        "ms": 1e3 * each,
        "gb_s": facts["bytes"] / each / 1e9,
        "tflop_s": facts["flops"] / each / 1e12,
        "fraction_of_floor": facts["floor_ms"] / (1e3 * each),
        "error": float(np.max(errors)),  # NaN if one of them is
        "note": None,
    }


def seconds(row: Row, compiled: Any, repeats: int, make: Any = None) -> float:
    """Times one call of the operation in a compiled row, on new inputs.

    Args:
      row: what is timed.
      compiled: its program.
      repeats: as for `median_seconds`.
      make: makes the inputs from a random key; None compiles `row.inputs`.
    """
    inputs = list((make or jax.jit(row.inputs))(jax.random.key(0)))

    def call():
        out = compiled(*inputs)
        for position in row.donated:  # the memory now holds the new value
            inputs[position] = out[-1]
        return out

    return median_seconds(call, repeats) / row.steps


def growth(results: Sequence[Result]) -> dict[str, float]:
    """Time of the longest over that of the shortest T of the rows "length-..." with equal B·T.

    Returns:
      "implementation, what" to the factor; only where both ends were measured and B·T is equal.
    """
    out = {}
    lengths = [r for r in results if r["name"].startswith("length-") and r["ms"] is not None]
    for key in sorted({(r["implementation"], r["what"]) for r in lengths}):
        same = [r for r in lengths if (r["implementation"], r["what"]) == key]
        ends = [f(same, key=lambda r: r["sizes"]["T"]) for f in (min, max)]
        tokens = {r["sizes"]["B"] * r["sizes"]["T"] for r in ends}
        if len(tokens) == 1 and ends[0] is not ends[1]:
            out[", ".join(key)] = ends[1]["ms"] / ends[0]["ms"]
    return out
