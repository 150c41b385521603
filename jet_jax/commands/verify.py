"""`jet-jax verify`: recomputes a model's recorded outputs and compares."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import zipfile
from pathlib import Path
from typing import Any

TOLERANCE = 2e-5


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "verify",
        help="recompute a model's recorded outputs and compare",
        description="Recomputes, in float32, every array of a file of recorded outputs and prints "
        "one line each: the relative L2 error, and whether greedy tokens are equal. Exits with 1 "
        "if one is above the tolerance, unequal or unknown. The arrays: tests/golden/README.md.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="Hugging Face or converted directory")
    parser.add_argument(
        "expected",
        nargs="?",
        metavar="EXPECTED.npz",
        help="the recorded outputs (default: MODEL_DIR/expected.npz)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest relative L2 error that passes (default: %(default)g)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def _read(path: Path, named: bool) -> dict[str, Any]:
    """The arrays of the file. Raises ValueError when there is none that can be read."""
    import numpy as np

    if not path.is_file():
        hint = "" if named else "; name the file of recorded outputs as the second argument"
        raise ValueError(f"{path} does not exist{hint}")
    if not zipfile.is_zipfile(path):  # numpy would advise to allow pickles
        raise ValueError(f"{path} cannot be read as an .npz file: it is not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own
        raise ValueError(f"{path} cannot be read as an .npz file: {error}") from error


def _as_json(check: Any) -> dict[str, Any]:
    """The check as JSON, which has no nan or infinity: such an error becomes null."""
    out = dataclasses.asdict(check)
    if check.error is not None and not math.isfinite(check.error):
        out["error"] = None
    return out


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns 0 if everything passed, else 1."""
    from rich.console import Console
    from rich.text import Text

    import jet_jax
    from jet_jax.verify import verify

    if not args.tolerance > 0:
        raise ValueError(f"--tolerance {args.tolerance} must be positive")
    path = Path(args.expected or Path(args.model) / "expected.npz")
    recording = _read(path, named=args.expected is not None)
    model = jet_jax.load(args.model, dtype="float32")
    checks = []
    console = Console(highlight=False, soft_wrap=True)
    for check in verify(model, recording, args.tolerance):
        checks.append(check)
        if args.json:
            continue
        error = "" if check.error is None else f"relative L2 error {check.error:.2e}"
        note = f"({check.note})" if check.note and error else check.note
        line = " ".join(p for p in (f"{check.name:<20}", error, note) if p) + "  "
        verdict = ("ok", "green") if check.passed else ("FAILED", "bold red")
        console.print(Text(line).append(*verdict))
    passed = all(check.passed for check in checks)
    if args.json:
        report = {
            "model": str(args.model),
            "expected": str(path),
            "tolerance": args.tolerance,
            "passed": passed,
            "checks": [_as_json(check) for check in checks],
        }
        print(json.dumps(report, indent=1))
    elif not passed:
        failed = ", ".join(check.name for check in checks if not check.passed)
        console.print(f"not within {args.tolerance:g}: {failed}")
    return 0 if passed else 1
