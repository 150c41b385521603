"""`jet-jax bench`: measures on the device that is there; one kind of benchmark a word."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

KINDS = {
    "kernels": "the kernels beside plain XLA and the hardware's floors",
    "blocks": "the linear-attention blocks side by side, at equal state sizes",
}


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="measure kernels and layers on the device that is there",
        description="Measures on the device that is there.",
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    kernels = kinds.add_parser(
        "kernels",
        help=KINDS["kernels"],
        description="Times the gated delta rule, its decoding step and the convolutions at "
        "the sizes of Jet-Nemotron-2B and -4B (small ones on a CPU), forward and with gradients, "
        "beside the floor that a copy and a matrix product measured in the same run allow, and "
        "compares results with the token-by-token reference in float32.",
    )
    kernels.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help="rows to run, by name or pattern such as 'step*' (default: all)",
    )
    kernels.add_argument("--quick", action="store_true", help="five rows only")
    kernels.add_argument("--list", action="store_true", help="print the rows and stop")
    blocks = kinds.add_parser(
        "blocks",
        help=KINDS["blocks"],
        description="Times one layer of each linear-attention block at width 1536 with a state of "
        "294,912 elements (an eighth of every width on a CPU): training tokens/s, the forward "
        "pass, and the decoding step of its recurrence beside the traffic of the state.",
    )
    blocks.add_argument(
        "--blocks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="blocks to run, by name or pattern such as 'g*' (default: all)",
    )
    blocks.add_argument(
        "--quick", action="store_true", help="three blocks, training at one size and the step only"
    )
    blocks.add_argument("--list", action="store_true", help="print the blocks' sizes and stop")
    for kind, what in ((kernels, "what to time"), (blocks, "of the operations that have them")):
        kind.add_argument(
            "--implementations",
            nargs="+",
            choices=("pallas", "xla"),
            help=f"{what} (default: both; on a CPU, where kernels are interpreted, xla)",
        )
        kind.add_argument(
            "--repeats", type=int, default=5, help="batches of calls a time (default: %(default)s)"
        )
        kind.add_argument("--json", metavar="FILE", help="also write everything to a JSON file")


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark; returns 0. Raises ValueError for a name or file that cannot be."""
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats} must be at least 1")
    if args.json:
        path = Path(args.json)
        if path.is_dir() or not path.parent.is_dir():
            reason = (
                "is a directory" if path.is_dir() else "lies in a directory that does not exist"
            )
            raise ValueError(f"--json {path} {reason}")
    import jax

    is_cpu = jax.default_backend() == "cpu"
    if args.kind == "blocks":
        from jet_jax.bench import blocks

        return _blocks(args, blocks.choose(blocks.all_blocks(is_cpu), args.blocks, args.quick))
    from jet_jax.bench import kernels, rows

    chosen = kernels.choose(rows.all_rows(small=is_cpu), args.rows, args.quick)
    if args.list:
        for row in chosen:
            print(f"{row.name:<22} {row.op}, {row.what}, {_sizes(row.sizes)}")
        return 0
    return _kernels(args, chosen, is_cpu)


def _sizes(sizes: dict[str, int]) -> str:
    return " ".join(f"{dim}{size}" for dim, size in sizes.items())


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:  # a file or a pipe has room
        console = Console(highlight=False, width=120)
    return console


def _start(args: argparse.Namespace, is_cpu: bool) -> tuple[Any, dict[str, Any]]:
    """The ceilings, measured, and the part of a report that says where and how."""
    import jax

    from jet_jax.bench import timing

    ceilings = timing.measure_ceilings(small=is_cpu, repeats=args.repeats)
    return ceilings, {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_gb_s": ceilings.copy_gb_s,
        "matmul_tflop_s": ceilings.matmul_tflop_s,
        "how": timing.HOW,
    }


def _title(report: dict[str, Any]) -> str:
    return (
        f"{report['device']}, jax {report['jax']}: copy {report['copy_gb_s']:,.0f} GB/s, "
        f"bfloat16 product {report['matmul_tflop_s']:.3g} TFLOP/s"
    )


def _write(path: str | None, report: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _blocks(args: argparse.Namespace, chosen: list[Any]) -> int:
    import jax

    from jet_jax.bench import block_runs, block_tables

    console, is_cpu = _console(), jax.default_backend() == "cpu"
    console.print(block_tables.sizes_table(chosen))
    if args.list:
        return 0
    implementations = args.implementations or (["xla"] if is_cpu else ["pallas", "xla"])
    total = sum(
        block_runs.num_results(block, implementations, is_cpu, args.quick) for block in chosen
    )
    results: list[dict[str, Any]] = []
    with console.status("measuring the device") as status:
        ceilings, report = _start(args, is_cpu)
        report |= {"how": f"{report['how']} {block_runs.HOW}"}
        report |= {"blocks": [block.facts() for block in chosen], "rows": results, "ratios": {}}
        status.update(f"compiling {chosen[0].name}")
        for result in block_runs.run(
            chosen, implementations, ceilings, args.repeats, small=is_cpu, quick=args.quick
        ):
            results.append(result)
            report["ratios"] = block_runs.ratios(results)
            _write(args.json, report)  # so that a run that is stopped leaves what it has
            status.update(f"{len(results)} of {total} measured, last {result['name']}")
    console.print(block_tables.layers_table(_title(report), chosen, results))
    console.print(block_tables.steps_table(chosen, results))
    console.print(report["how"])
    return 0


def _kernels(args: argparse.Namespace, chosen: list[Any], is_cpu: bool) -> int:
    from jet_jax.bench import kernels

    console = _console()
    ceilings, report = _start(args, is_cpu)
    implementations = args.implementations or (["xla"] if is_cpu else ["pallas", "xla"])
    results = []
    with console.status("compiling") as status:
        for result in kernels.run(chosen, implementations, ceilings, args.repeats):
            results.append(result)
            status.update(f"{len(results)} of {len(chosen) * len(implementations)} measured")
    report |= {"rows": results, "growth": kernels.growth(results)}
    console.print(_table(_title(report), results))
    for key, factor in report["growth"].items():
        console.print(f"From the shortest to the longest T at equal B·T, {key}: {factor:.2f}×")
    console.print(report["how"])
    _write(args.json, report)
    return 0


def _table(title: str, results: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table("row", "sizes", "", title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("ms", "GB/s", "TFLOP/s", "floor ms", "of floor", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    last = None
    for r in results:
        first = ["", ""] if r["name"] == last else [r["name"], _sizes(r["sizes"])]
        last = r["name"]
        floor = f"{r['floor_ms']:,.3f}"
        if r["ms"] is None:
            table.add_row(*first, r["implementation"], "", "", "", floor, "", r["note"])
            continue
        table.add_row(
            *first,
            r["implementation"],
            f"{r['ms']:,.3f}",
            f"{r['gb_s']:,.1f}",
            f"{r['tflop_s']:.3g}" if r["flops"] else "",
            floor,
            f"{100 * r['fraction_of_floor']:.0f} %",
            f"{r['error']:.1e}",
        )
    return table
