"""Options of commands that load a model: its dtype and its tokenizer."""

from __future__ import annotations

import argparse


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--dtype` and `--tokenizer`."""
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of weights and computation; by default float32 on a CPU and bfloat16 elsewhere",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="by default the one in the model's directory"
    )


def dtype_of(args: argparse.Namespace) -> str:
    """The dtype that was asked for, or the default device's own."""
    import jax

    return args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
