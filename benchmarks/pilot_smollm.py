"""The pilot of a search: what its steps cost, what the teacher can do, and which settings to take.

    python benchmarks/pilot_smollm.py --teacher models/smollm2 --train 'corpus/train-*.jsonl'
        --valid corpus/valid.jsonl --out runs/pilot [--only speed gates init lr seeds]

    speed   tokens/s of alignment, sampled paths, scoring, and full training on KL
    gates   the untouched teacher's accuracy by task, length and difficulty; perplexity by position
    init    random, copied, or copied and refitted linear paths: errors by layer after 2M tokens
    lr      three peak learning rates of the alignment and of the sampled paths, 2M tokens each
    seeds   4 seeds of alignment and sampled paths: spread of KL and retrieval of fixed placements,
            and the paper's figure alone (random paths, own stream, squared error) as one arm

Every piece is written to OUT/pilot.json when it is done and is not done again; OUT/pilot.md has the
tables. With --minutes a run ends before its time is up: start it again to go on.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

from benchmarks.pilot import gates, speed, tables  # noqa: E402
from benchmarks.pilot.arms import Arms  # noqa: E402
from benchmarks.pilot.ledger import Clock, Ledger, OutOfTime  # noqa: E402
from benchmarks.pilot.material import KINDS, Material, Sizes  # noqa: E402
from jet_jax.postnas.inherit import INITS  # noqa: E402
from jet_jax.sharding import make_mesh  # noqa: E402

SECTIONS = ("speed", "gates", "init", "lr", "seeds")
ALIGN_LRS = (1e-3, 2e-3, 4e-3)
PATH_LRS = (3e-4, 5e-4, 1e-3)
SEEDS = 4


class Piece(NamedTuple):
    """A part of the pilot: its name in the ledger, and what makes it."""

    name: str
    run: Callable[[], dict[str, Any]]


def speed_pieces(arms: Arms, scaled: bool) -> Iterator[Piece]:
    """Throughput."""
    for name, measure in speed.PIECES.items():
        yield Piece(f"speed/{name}", partial(measure, arms, scaled))


def gate_pieces(material: Material) -> Iterator[Piece]:
    """The teacher's figures."""
    for task in gates.TASKS:
        for length in material.sizes.lengths[: 1 if task in gates.ONE_LENGTH else None]:
            yield Piece(f"gates/{task}/{length}", partial(gates.gate, material, task, length))
    yield Piece("gates/by position", partial(gates.by_position, material))


def _align(arms: Arms, kind: str, init: str, lr: float, seed: int) -> Piece:
    return Piece(f"align/{kind}/{init}/{lr:g}/{seed}", partial(arms.align, kind, init, lr, seed))


def init_pieces(arms: Arms) -> Iterator[Piece]:
    """Initialisations."""
    for kind in KINDS:
        for init in INITS:
            yield _align(arms, kind, init, arms.usual[1], 0)


def lr_pieces(arms: Arms) -> Iterator[Piece]:
    """Learning rates."""
    for kind in KINDS:
        for lr in ALIGN_LRS:
            yield _align(arms, kind, arms.usual[0], lr, 0)
    for lr in PATH_LRS:
        yield Piece(f"paths/{lr:g}/0", partial(arms.paths, lr, 0))


def seed_pieces(arms: Arms) -> Iterator[Piece]:
    """Seeds, and the paper's figure alone."""
    lr = arms.material.config.supernet.optim.lr
    for seed in range(SEEDS):
        yield _align(
            arms, "gla", arms.material.config.linear.init, arms.material.config.align.optim.lr, seed
        )
        yield Piece(f"paths/{lr:g}/{seed}", partial(arms.paths, lr, seed))
    yield Piece("literal/0", partial(arms.literal, lr, 0))


def pieces(arms: Arms, sections: tuple[str, ...], scaled: bool) -> list[Piece]:
    """All pieces of some sections, each once, in order."""
    made = {
        "speed": lambda: speed_pieces(arms, scaled),
        "gates": lambda: gate_pieces(arms.material),
        "init": lambda: init_pieces(arms),
        "lr": lambda: lr_pieces(arms),
        "seeds": lambda: seed_pieces(arms),
    }
    found = {piece.name: piece for section in sections for piece in made[section]()}
    return list(found.values())


def run(wanted: list[Piece], ledger: Ledger, clock: Clock) -> bool:
    """Does what is not done.

    Returns:
      Whether all of it is done.
    """
    for piece in (p for p in wanted if p.name not in ledger):
        try:
            clock.check(1.2 * clock.longest)
            start = time.monotonic()
            result = piece.run()
        except OutOfTime:
            return False
        seconds = time.monotonic() - start
        clock.longest = max(clock.longest, seconds)
        ledger.put(piece.name, result | {"seconds": seconds})
        print(f"{time.monotonic() - clock.start:6.0f} s  {piece.name}: {seconds:.1f} s", flush=True)
    return True


def digest(patterns: Iterable[str]) -> str:
    """Of the contents of all files that match, in the order of their names.

    Raises:
      ValueError: a pattern matches no file.
    """
    whole = hashlib.sha256()
    for pattern in patterns:
        paths = sorted(glob.glob(pattern))
        if not paths:
            raise ValueError(f"no file matches {pattern}")
        for path in paths:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    """Runs the pilot, or goes on with it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, metavar="DIR", help="the model")
    parser.add_argument("--train", required=True, nargs="+", metavar="GLOB", help="training text")
    parser.add_argument("--valid", required=True, nargs="+", metavar="FILE", help="held-out text")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--scale", type=float, default=1.0, help="of all sizes, to try it")
    parser.add_argument("--minutes", type=float, help="time that the run may take")
    parser.add_argument("--dtype", help="of the computation, by default the teacher's")
    parser.add_argument("--threads", type=int, default=8, help="that tokenize")
    args = parser.parse_args(argv)
    if not 0 < args.scale <= 1:
        parser.error(f"--scale {args.scale:g} must lie between 0 and 1")
    clock = Clock(args.minutes)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        inputs = {
            "teacher": digest([f"{args.teacher}/*.safetensors", f"{args.teacher}/*.json"]),
            "train": digest(args.train),
            "valid": digest(args.valid),
        }
        settings = {"scale": args.scale, "dtype": args.dtype, "inputs": inputs}
        ledger = Ledger(args.out / "pilot.json", settings)
        material = Material(
            args.teacher, tuple(args.train), tuple(args.valid), Sizes.scaled(args.scale),
            make_mesh(devices=jax.devices()[:1]), clock, args.dtype, args.threads,
        )  # fmt: skip
        arms = Arms(material, partial(gates.retrieval_rows, material, ledger))
        ledger.begin(
            {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "python": platform.python_version(),
                "teacher_parameters": material.search.teacher.param_count(),
            }
        )
        wanted = pieces(arms, tuple(args.only), scaled=args.scale < 1)
        with jax.set_mesh(material.mesh):
            done = run(wanted, ledger, clock)
    except (ValueError, OSError) as error:
        sys.exit(f"pilot_smollm.py: error: {error}")
    page = tables.page(ledger)
    (args.out / "pilot.md").write_text(page, encoding="utf-8")
    print(page)
    left = [piece.name for piece in wanted if piece.name not in ledger]
    if not done:
        print(f"stopped in time: {len(left)} of {len(wanted)} pieces are left; run it again")


if __name__ == "__main__":
    main()
