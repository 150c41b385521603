"""Finds block sizes for the kernels on the device that is there.

    python benchmarks/tune_kernels.py ROW [ROW ...] [--fields NAME ...] [--repeats N]

ROW is a row of `jet-jax bench kernels --list`; its operation is timed as it is called there, while
one field of its block sizes after another takes every value of the search space below and keeps the
best (values are compiled beside each other; one that does not compile is told and skipped). Printed
are all times, and last the block sizes to paste into the operation's blocks.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from jet_jax.bench import kernels, rows  # noqa: E402

# By path: in their package the operations' own names hide the modules.
conv_module = import_module("kernels_pallas.dynamic_conv.pallas")
rule_module = import_module("kernels_pallas.gated_delta_rule.pallas")
step_module = import_module("kernels_pallas.gated_delta_rule.step_pallas")

WARPS_STAGES = [(w, s) for w in (4, 8) for s in (1, 2, 3)]
Table = Callable[..., Any]  # returns the block sizes for a shape


@dataclasses.dataclass(frozen=True)
class Space:
    """Where an operation looks up its block sizes, and what to try.

    Attributes:
      module: the module that looks them up.
      table: name of the function in it that does.
      fields: values by field, in the order in which they are tried.
      applies: whether a look-up with these arguments is the one to tune.
      fixed: fields that have these values while it is measured, whatever the table keeps.
    """

    module: Any
    table: str
    fields: dict[str, Sequence[Any]]
    applies: Callable[..., bool] = lambda *_: True
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def override(self, blocks: Any) -> Any:
        """A context in which the look-up answers with `blocks`."""
        original: Table = getattr(self.module, self.table)
        for field, value in self.fixed.items():
            blocks = replaced(blocks, field, value)

        def table(*args: Any) -> Any:
            return blocks if self.applies(*args) else original(*args)

        return mock.patch.object(self.module, self.table, table)

    def current(self, function: Callable[..., Any], inputs: Any) -> Any:
        """What the table says today: noted while the function is traced."""
        original: Table = getattr(self.module, self.table)
        seen = []

        def table(*args: Any) -> Any:
            blocks = original(*args)
            if self.applies(*args):
                seen.append(blocks)
            return blocks

        with mock.patch.object(self.module, self.table, table):
            jax.eval_shape(function, *inputs)
        return seen[-1]


def space(row: rows.Row) -> Space:
    """The search space of a row's operation."""
    backward = row.what == rows.BOTH
    if row.op == "gated_delta_step":
        fields = {
            "v_block": (16, 32, 64, 128, 256),
            "warps": (1, 2, 4, 8),
            "part": (8, 16, 32),
        }
        return Space(step_module, "find_step_blocks", fields)
    if row.op == "dynamic_conv":
        which = "backward" if backward else "forward"
        fields = {
            "rows": (64, 128, 256),
            "channels": (16, 32, 64, 128),
            "depth": (32, 64, 128),
            "warps": (4, 8),
            "stages": (2, 3, 4),
            "programs": (132, 264),
        }
        return Space(conv_module, "choose", fields, lambda _, name, *rest: name == which)
    fields = {
        "v_block": (32, 64, 128),
        "scores": WARPS_STAGES,
        "walk": WARPS_STAGES,
        "ahead": (False, True),
        "programs": (192, 384, 768, 1536),
    }
    if backward:
        fields = {
            "v_block": (32, 64, 128),
            "states": WARPS_STAGES,
            "back": WARPS_STAGES,
            "v_step": (32, 64, 128),
            "gradients": WARPS_STAGES,
        }
    # Triton proper has blocks of its own.
    return Space(rule_module, "find_blocks", fields, fixed={"driver": "pallas"})


def replaced(blocks: Any, field: str, value: Any) -> Any:
    """A copy of a dataclass or NamedTuple with another value."""
    if dataclasses.is_dataclass(blocks):
        return dataclasses.replace(blocks, **{field: value})
    return blocks._replace(**{field: value})


def tune(
    function: Callable[[], Callable[..., Any]],
    measure: Callable[[Any], float],
    shapes: Sequence[Any],
    where: Space,
    fields: dict[str, Sequence[Any]],
    donated: tuple[int, ...],
) -> Iterator[tuple[str, Any, float | str, Any]]:
    """Tries the values of one field after another.

    Args:
      function: makes a new function of the inputs, so that nothing traced is used twice.
      measure: times a compiled function, in seconds.
      shapes: of the inputs.
      where: the table to override.
      fields: values by field.
      donated: positions of the inputs whose memory the function may use.

    Yields:
      Field, value, seconds or the reason why there are none, and the best block sizes so far.
    """
    best, least = where.current(function(), shapes), float("inf")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for field, values in fields.items():
            candidates = [replaced(best, field, value) for value in values]

            def lower(blocks: Any) -> Any:
                with where.override(blocks):
                    return jax.jit(function(), donate_argnums=donated).lower(*shapes)

            def compiled(lowered: Any) -> Any:
                return lowered if isinstance(lowered, str) else attempt(lowered.compile)

            lowered = [attempt(lambda b=b: lower(b)) for b in candidates]
            programs = list(pool.map(compiled, lowered))
            for value, blocks, program in zip(values, candidates, programs, strict=True):
                outcome = program
                if not isinstance(program, str):
                    outcome = attempt(lambda p=program: measure(p))
                if isinstance(outcome, float) and outcome < least:
                    best, least = blocks, outcome
                yield field, value, outcome, best


def attempt(call: Callable[[], Any]) -> Any:
    """The call's result, or one line about its failure: a tile can be too large in many ways."""
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="+", metavar="ROW")
    parser.add_argument("--fields", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu:
        parser.error("there is no GPU or TPU here: kernels would be interpreted")
    try:
        chosen = kernels.choose(rows.all_rows(small=on_cpu), args.rows, quick=False)
    except ValueError as error:
        parser.error(str(error))
    print(jax.devices()[0].device_kind, "jax", jax.__version__, flush=True)
    for row in chosen:
        where = space(row)
        unknown = set(args.fields) - set(where.fields)
        if unknown:
            parser.error(f"{row.op} has no field {', '.join(unknown)}: {', '.join(where.fields)}")
        fields = {f: v for f, v in where.fields.items() if not args.fields or f in args.fields}
        shapes = jax.eval_shape(row.inputs, jax.random.key(0))
        print(f"{row.name}: {row.op}, {row.what}, {row.sizes}", flush=True)
        results = tune(
            lambda row=row: row.function("pallas"),
            lambda program, row=row: kernels.seconds(row, program, args.repeats),
            shapes,
            where,
            fields,
            row.donated,
        )
        best = None
        for field, value, outcome, kept in results:
            time = outcome if isinstance(outcome, str) else f"{1e3 * outcome:.4f} ms"
            print(f"  {field}={value}: {time}", flush=True)
            best = kept
        print(f"  best: {best}", flush=True)


if __name__ == "__main__":
    main()
