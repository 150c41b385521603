"""`jet-jax convert`: converts a model between Hugging Face and Orbax directories."""

from __future__ import annotations

import argparse
import re
from typing import Any

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes from a size such as "5GB", "500 MB", "1.5GiB" or a plain number of bytes.

    Raises:
      ValueError: it is no such size, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match and match[2].upper() in _UNITS:
        size = int(float(match[1]) * _UNITS[match[2].upper()])
        if size >= 1:
            return size
    raise ValueError(f"size {text!r} is not a number of bytes; write for example 5GB or 500MiB")


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="convert a model between Hugging Face and Orbax directories",
        description="Converts a model bit for bit, config and tokenizer files included. The "
        "destination is whole or not there.",
    )
    parser.add_argument("source", metavar="SRC", help="Hugging Face, converted or training folder")
    parser.add_argument("destination", metavar="DST", help="folder to write")
    parser.add_argument(
        "--to", choices=("hf", "orbax"), help="format to write (default: the one SRC is not)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a model that DST already holds"
    )
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="most bytes of weights in one safetensors file (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns 0. Raises ValueError for what cannot be converted."""
    size = parse_size(args.max_shard_size)
    from jet_jax.convert import convert

    convert(
        args.source,
        args.destination,
        to=args.to,
        overwrite=args.overwrite,
        max_shard_bytes=size,
    )
    print(f"wrote {args.destination}")
    return 0
