"""`jet-jax sample`: text that a model writes, to distil from it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jet_jax.commands.model_options import add_model_options, dtype_of

if TYPE_CHECKING:
    from jet_jax.sample_file import SampleFile


def add_parser(subparsers: Any) -> None:
    """Adds the arguments of `jet-jax sample`."""
    parser = subparsers.add_parser(
        "sample",
        help="write text with a model, to train others on",
        description="Writes rows of text with a model, each the continuation of a document's "
        "beginning, to a .jsonl file that train.py takes. Run the same command again and it goes "
        "on where it stopped; with more --rows it adds to them.",
    )
    add = parser.add_argument
    add("model", help="a Hugging Face, converted or training directory")
    add(
        "--documents",
        nargs="+",
        required=True,
        metavar="FILE",
        help="txt or jsonl text files whose documents' beginnings are continued",
    )
    add("--out", required=True, metavar="FILE", help="the .jsonl file")
    add("--rows", type=int, default=2048, metavar="N", help="default %(default)s")
    add(
        "--tokens",
        type=int,
        default=1024,
        metavar="N",
        help="of a row, its beginning included (default: %(default)s)",
    )
    add(
        "--head",
        type=_range,
        default=(8, 32),
        metavar="A-B",
        help="tokens taken from a document (default: 8-32)",
    )
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="default %(default)s, the model's own distribution",
    )
    add("--batch", type=int, default=64, metavar="N", help="rows at a time (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 0.

    Raises:
      ValueError: for a directory without a model or tokenizer, documents that cannot be read,
        numbers out of their range, or an output of other settings; no weights are read before.
    """
    for name in ("rows", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 1")
    if args.batch > 512:
        raise ValueError(f"--batch {args.batch} must be at most 512")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must not be negative")

    from jet_jax.continuations import Continuations, write_texts
    from jet_jax.data.sources import TextSource
    from jet_jax.generation import Generator
    from jet_jax.io import load, load_config
    from jet_jax.prompt_text import ending_ids, find_tokenizer, load_matching
    from jet_jax.sample_file import SampleFile
    from jet_jax.sampling import make_sampling

    wanted = Continuations(args.tokens, args.head, args.temperature, args.seed)
    config = load_config(args.model)
    make_sampling(config.vocab_size, args.temperature)
    where = find_tokenizer(args.model, args.tokenizer)
    tokenizer = load_matching(where, config)
    documents = TextSource(args.documents)
    dtype = dtype_of(args)
    out = SampleFile(
        args.out,
        {
            "model": os.path.abspath(args.model),
            "tokenizer": os.path.abspath(where),
            "documents": [len(documents), documents.num_bytes],
            "tokens": args.tokens,
            "head": args.head,
            "temperature": args.temperature,
            "batch": args.batch,
            "seed": args.seed,
            "dtype": dtype,
        },
    )
    generator = Generator(load(args.model, dtype=dtype), lanes=args.batch)
    out.open()
    try:
        done = min(out.rows, args.rows)
        texts = write_texts(
            generator,
            tokenizer,
            documents,
            wanted,
            args.rows,
            done=done,
            end_ids=ending_ids(where, tokenizer, generator.config),
        )
        _write(out, texts, done, args.rows)
    finally:
        out.close()
    return 0


def _write(out: SampleFile, texts: Iterator[str], done: int, rows: int) -> None:
    """Writes the texts, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    if done:
        console.print(f"{out.path} has {done} rows; going on.", markup=False)
    columns = (BarColumn(20), MofNCompleteColumn(), Elapsed(), TextColumn("left"), Remaining())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=rows, completed=done)
        for text in texts:
            out.add(text)
            bar.advance(task)
    console.print(f"{out.path}: {out.rows} rows.", markup=False)


def _range(text: str) -> tuple[int, int]:
    """`8-32` as two numbers; one number is both."""
    low, _, high = text.partition("-")
    try:
        return int(low), int(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected two numbers, such as 8-32") from None
