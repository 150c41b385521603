"""The linear-attention blocks beside flash-linear-attention's layers on one GPU: JSON and a table.

    python benchmarks/blocks.py OUT.json [--blocks NAME ...] [--sides pallas xla torch]
                                         [--seconds N] [--again] [--repeats N]

The rows are those of `jet-jax bench blocks`, with kernels and in plain XLA, and those of
peer_fla_blocks.py. Each block and side runs in a process of its own, so that one that fails or
hangs is a note and takes nothing else with it. Results are printed and written as soon as they are
known; what OUT.json has is kept and not measured again (without --again), so a run may be cut into
pieces: --seconds ends it in time, and the same command goes on. The table, the one of RESULTS.md,
shows all that OUT.json has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jet_jax"))

from jet_jax.bench import block_rows, block_runs, blocks, timing  # noqa: E402

OURS, PEER = ("pallas", "xla"), "torch"
SIDES = (*OURS, PEER)
LEAST = 30  # seconds under which no process is started
Report = dict[str, Any]


def measure_ours(name: str, implementation: str, repeats: int) -> None:
    """Prints a JSON line for each result of one block; small sizes on a CPU."""
    import jax

    small = jax.default_backend() == "cpu"
    (block,) = blocks.choose(blocks.all_blocks(small), [name], quick=False)
    ceilings = timing.measure_ceilings(small, repeats)
    start = {"device": jax.devices()[0].device_kind, "versions": {"jax": jax.__version__}}
    start |= {"copy_gb_s": ceilings.copy_gb_s, "matmul_tflop_s": ceilings.matmul_tflop_s}
    print(json.dumps({"start": start | {"facts": block.facts()}}), flush=True)
    for result in block_runs.run([block], [implementation], ceilings, repeats, small=small):
        print(json.dumps(result), flush=True)


def command(block: blocks.Block, side: str, repeats: int, folder: Path) -> list[str]:
    """The process that measures a block on a side."""
    if side != PEER:
        options = ["--sides", side, "--repeats", str(repeats)]
        return [sys.executable, __file__, "--measure", block.name, *options]
    path = folder / f"{block.name}.json"
    described = {
        "name": block.name,
        "width": block.width,
        "options": block.options,
        "shared": block.shared,
        "sizes": [{"B": b, "T": t} for b, t in block_rows.SIZES],
    }
    path.write_text(json.dumps(described), encoding="utf-8")
    return [sys.executable, str(ROOT / "benchmarks" / "peer_fla_blocks.py"), str(path)]


def stream(arguments: list[str], seconds: float) -> Iterator[Any]:
    """Runs a process and yields the JSON objects that it prints, one a line.

    Args:
      arguments: the command.
      seconds: after which it is killed.

    Yields:
      The objects, and last {"end": why it failed or None, "late": whether it was killed}.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read().strip()
    why = None
    if late.is_set():
        why = f"stopped after {seconds:.0f} s"
    elif status:
        print(said[-3000:], file=sys.stderr, flush=True)
        last = said.splitlines()[-1] if said else ""
        why = f"ended with status {status}: {last[:200]}"
    yield {"end": why, "late": late.is_set()}


def measure(
    report: Report, block: blocks.Block, side: str, arguments: list[str], seconds: float
) -> Iterator[None]:
    """Measures a block on a side into the report; yields whenever that has changed."""
    of_side = report["blocks"].setdefault(block.name, block.facts()).setdefault("sides", {})
    found = of_side[side] = {"start": None, "results": [], "done": False, "note": None}
    for said in stream(arguments, seconds):
        if "start" in said:
            found["start"] = said["start"]
            report["blocks"][block.name] |= said["start"].pop("facts", {})
        elif "end" in said:
            found["note"], found["done"] = said["end"], not said["late"]
        else:
            found["results"].append(said)
        print(f"{block.name}, {side}: {brief(said)}", file=sys.stderr, flush=True)
        yield


def brief(said: dict[str, Any]) -> str:
    """A line about what a process said."""
    if "start" in said:
        return f"on {said['start']['device']}"
    if "end" in said:
        return said["end"] or "done"
    time = "" if said["ms"] is None else f"{said['ms']:.4f} ms"
    rate = f"{said['tokens_s']:,.0f} tokens/s" if said.get("tokens_s") else ""
    return ", ".join(
        x for x in (said["name"], said.get("implementation"), time, rate, said["note"]) if x
    )


def pending(
    report: Report, chosen: list[blocks.Block], sides: list[str], again: bool
) -> list[tuple[blocks.Block, str]]:
    """What is not measured yet, or only until its time was up; the JetBlock has no peer."""
    out = []
    for block in chosen:
        known = report["blocks"].get(block.name, {}).get("sides", {})
        for side in sides:
            done = known.get(side, {}).get("done", False)
            if (again or not done) and (side, block.name) != (PEER, "jet"):
                out.append((block, side))
    return out


def markdown(report: Report) -> str:
    """The layers' table, a line a block and size, and the decoding steps'.

    Of our two sides the faster counts; the note says which it is.
    """
    rates: dict[tuple[bool, str, str], dict[str, Any]] = {}  # by whether it is ours
    steps = []
    for name, facts in report["blocks"].items():
        for side, found in facts["sides"].items():
            for r in found["results"]:
                key = side != PEER, name, r["name"].removeprefix(f"{name}-")
                known = rates.get(key, {"ms": None})
                if r["op"] != "layer":
                    steps.append((name, facts, r))
                elif key not in rates or (r["ms"] and r["ms"] < (known["ms"] or float("inf"))):
                    rates[key] = r
    sizes = sorted({size for _, _, size in rates if size.endswith("-grad")}, reverse=True)
    lines = [
        "| block | size | tokens/s | PyTorch | ratio | of gdn | PyTorch | paper | forward ms "
        "| PyTorch | error | note |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sizes:
        for name, facts in report["blocks"].items():
            pair, ahead, base = (
                [rates.get((ours, *key), {}) for ours in (True, False)]
                for key in (
                    (name, size),
                    (name, size.removesuffix("-grad")),
                    (blocks.BASE, size),
                )
            )
            if any(pair):
                cells = layer_cells(pair, ahead, base, facts["paper_ratio"])
                lines.append(f"| `{name}` | {size_name(size)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| decoding step | state H×K×V | | ms | floor ms | of floor | GB/s | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, facts, r in steps:
        state = "×".join(str(facts["state"][dim]) for dim in "HKV")
        cells = [f"`{name}` B{r['sizes']['B']}", state, r["implementation"]]
        if r["ms"] is None:
            cells += [r["note"], f"{r['floor_ms']:.4f}", "", "", ""]
        else:
            cells += [f"{r['ms']:.4f}", f"{r['floor_ms']:.4f}", f"{r['ms'] / r['floor_ms']:.2f}×"]
            cells += [f"{r['gb_s']:.0f}", f"{r['error']:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size_name(size: str) -> str:
    """ "b8-t4096-grad" -> "B8 T4096"."""
    return " ".join(size.removesuffix("-grad").upper().split("-"))


def layer_cells(
    pair: list[dict[str, Any]],
    forward: list[dict[str, Any]],
    base: list[dict[str, Any]],
    paper: float | None,
) -> list[str]:
    """The cells of a layer's line; what was not measured is empty."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def ratio(a: dict[str, Any], b: dict[str, Any]) -> float | None:
        return a["tokens_s"] / b["tokens_s"] if a.get("tokens_s") and b.get("tokens_s") else None

    notes = [x["note"] for x in (*pair, *forward) if x.get("note")]
    if pair[0].get("ms"):
        notes.insert(0, pair[0]["implementation"])
    return [
        *(number(x.get("tokens_s"), ",.0f") for x in pair),
        number(ratio(*pair), ".2f"),
        *(number(ratio(x, y), ".2f") for x, y in zip(pair, base, strict=True)),
        number(paper, ".2f"),
        *(number(x.get("ms"), ".3f") for x in forward),
        number(pair[0].get("error"), ".1e"),
        "; ".join(dict.fromkeys(notes)),
    ]


def write(path: Path, report: Report) -> None:
    """Replaces the file as a whole, so that a run that is killed leaves one that can be read."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.json")
    parser.add_argument("--blocks", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seconds", type=float, default=500, help="of the whole run")
    parser.add_argument("--again", action="store_true", help="measure what OUT.json has, too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what `command` starts
    args = parser.parse_args()
    if args.measure:
        return measure_ours(args.measure, args.sides[0], args.repeats)
    if args.out is None:
        parser.error("OUT.json is missing")
    if not args.out.parent.is_dir():
        parser.error(
            f"{args.out} lies in a directory that does not exist" if args.out else "where to?"
        )
    try:
        chosen = blocks.choose(blocks.all_blocks(), args.blocks, quick=False)
    except ValueError as error:
        parser.error(str(error))
    report: Report = {"how": f"{timing.HOW} {block_runs.HOW}", "blocks": {}}
    if args.out.exists():
        report = json.loads(args.out.read_text(encoding="utf-8"))
    end = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory() as folder:
        for block, side in pending(report, chosen, args.sides, args.again):
            left = end - time.monotonic()
            if left < LEAST:
                break
            arguments = command(block, side, args.repeats, Path(folder))
            for _ in measure(report, block, side, arguments, left):
                write(args.out, report)
    print(markdown(report))
    for name, facts in report["blocks"].items():
        for side, found in facts["sides"].items():
            print(f"{name}, {side}: {json.dumps(found['start'])} {found['note'] or ''}")
    left_over = [
        f"{block.name} ({side})" for block, side in pending(report, chosen, args.sides, False)
    ]
    if left_over:
        print("not measured yet, the same command goes on:", ", ".join(left_over))


if __name__ == "__main__":
    main()
