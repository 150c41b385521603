"""The command `jet-jax`: one subcommand a module of `jet_jax.commands`.

Only the module of the chosen subcommand is imported, so help and errors come at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

# name: one line of help
COMMANDS = {
    "bench": "measure kernels and layers on the device that is there",
    "convert": "convert a model between Hugging Face and Orbax directories",
    "eval": "measure a model: retrieval, arithmetic, choices, perplexity",
    "generate": "continue prompts, streaming the text",
    "info": "layers, parameters, cache size and FLOPs of a config or model",
    "sample": "write text with a model, to train others on",
    "verify": "recompute a model's recorded outputs and compare",
}


def build_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser, with the arguments of the chosen subcommand only.

    Args:
      chosen: name of the subcommand to import; None imports none, which is enough for the
        overall help and for the error about an unknown subcommand.
    """
    parser = argparse.ArgumentParser(
        prog="jet-jax",
        description="Jet-Nemotron and PostNAS in JAX.",
        epilog="`jet-jax COMMAND --help` tells the arguments of one command.",
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == chosen:
            import_module(f"jet_jax.commands.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
      argv: the arguments after the program's name; `sys.argv[1:]` by default.

    Returns:
      The exit status: the subcommand's own, 1 for an error in what the user gave (its message is
      printed without a traceback), 130 after Ctrl-C. Wrong usage exits with 2, as argparse does.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Compiled programs are kept between runs; JAX reads this when a subcommand imports it.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jet_jax"))
    chosen = next((word for word in argv if not word.startswith("-")), None)
    args = build_parser(chosen).parse_args(argv)
    try:
        return import_module(f"jet_jax.commands.{args.command}").run(args)
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        sys.stderr.close()  # else Python complains once more when it flushes
        return 1
    except (ValueError, OSError) as error:
        print(f"jet-jax {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
