"""The kernels beside flash-linear-attention and plain XLA on one GPU: JSON and a table.

    python benchmarks/kernels.py OUT.json [--rows NAME ...] [--quick] [--repeats N] [--no-peer]
                                 [--peer-seconds N] [--implementations NAME ...]

The rows are those of `jet-jax bench kernels --list`. The PyTorch peers (peer_fla.py) run first, in
a process of their own on the same card; without the packages they need their column stays empty and
OUT.json says why. The table is the one of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jet_jax"))

from jet_jax.bench import kernels, rows, timing  # noqa: E402

IMPLEMENTATIONS = ("pallas", "xla")


def run_peer(chosen: list[rows.Row], limit: float | None) -> dict[str, Any]:
    """Results of peer_fla.py, or a "note" about why there are none; those that `limit` s allow."""
    described = [{"name": r.name, "op": r.op, "what": r.what, "sizes": r.sizes} for r in chosen]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        path.write_text(json.dumps(described), encoding="utf-8")
        command = [sys.executable, str(ROOT / "benchmarks" / "peer_fla.py"), str(path)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=limit)
            out, failure = done.stdout, f"peer_fla.py ended with status {done.returncode}"
            failure = failure if done.returncode else None
        except subprocess.TimeoutExpired as expired:
            out, failure = expired.stdout or b"", f"peer_fla.py was stopped after {limit:.0f} s"
    lines = out.decode().splitlines()  # one a row, each with all rows so far
    result = json.loads(lines[-1]) if lines else {"rows": {}}
    return result | ({"note": failure} if failure else {})


def markdown(results: list[dict[str, Any]], peer: dict[str, Any]) -> str:
    """One line a row: times by implementation, and the rates of the first that ran."""
    lines = [
        "| row | sizes | pallas ms | PyTorch ms | xla ms | floor ms | of floor | GB/s | TFLOP/s "
        "| error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_name: dict[str, dict[str, Any]] = {}
    for result in results:
        by_name.setdefault(result["name"], {})[result["implementation"]] = result
    for name, of in by_name.items():
        ours = next((r for r in of.values() if r["ms"]), next(iter(of.values())))
        sizes = " ".join(f"{dim}{size}" for dim, size in ours["sizes"].items())
        missing = {"ms": None, "note": ""}
        times = [of.get("pallas", missing), peer["rows"].get(name, missing), of.get("xla", missing)]
        cells = [f"{r['ms']:.3f}" if r["ms"] else r["note"] or "" for r in times]
        cells.append(f"{ours['floor_ms']:.3f}")
        if ours["ms"]:
            cells += [f"{100 * ours['fraction_of_floor']:.0f} %", f"{ours['gb_s']:.0f}"]
            cells += [f"{ours['tflop_s']:.0f}" if ours["flops"] else "", f"{ours['error']:.1e}"]
        else:
            cells += [""] * 4
        lines.append(f"| `{name}` | {sizes} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true", help="leave the PyTorch peers out")
    parser.add_argument(
        "--peer-seconds",
        type=float,
        metavar="N",
        help="stop the peers after so long (their autotuning takes minutes) and keep what is there",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=IMPLEMENTATIONS,
        choices=IMPLEMENTATIONS,
        help="of this project",
    )
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"{args.out} lies in a directory that does not exist")
    try:
        chosen = kernels.choose(rows.all_rows(small=False), args.rows, args.quick)
    except ValueError as error:
        parser.error(str(error))
    # Before JAX takes its share of the card's memory.
    peer = {"rows": {}, "note": "left out"} if args.no_peer else run_peer(chosen, args.peer_seconds)

    import jax

    ceilings = timing.measure_ceilings(small=False, repeats=args.repeats)
    results = []
    for result in kernels.run(chosen, args.implementations, ceilings, args.repeats):
        results.append(result)
        time = f"{result['ms']:.3f} ms" if result["ms"] else result["note"]
        print(result["name"], result["implementation"], time, file=sys.stderr, flush=True)
    report = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "copy_gb_s": ceilings.copy_gb_s,
        "matmul_tflop_s": ceilings.matmul_tflop_s,
        "how": timing.HOW,
        "rows": results,
        "growth": kernels.growth(results),
        "peer": peer,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"{report['device']}, jax {report['jax']}", end=": ")
    print(f"copy {ceilings.copy_gb_s:.0f} GB/s, product {ceilings.matmul_tflop_s:.0f} TFLOP/s")
    print(markdown(results, peer))
    for key, factor in report["growth"].items():
        print(f"growth from the shortest to the longest T, {key}: {factor:.2f}")
    notes = {r["note"] for r in peer["rows"].values() if r["note"]} | {peer.get("note")}
    print("PyTorch:", peer.get("versions", ""), *sorted(n for n in notes if n))


if __name__ == "__main__":
    main()
