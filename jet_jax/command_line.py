"""The command line of the two mains, train.py and search.py: absl flags and a config file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import flags
from ml_collections import config_flags


def parser(program: str) -> Callable[[Sequence[str]], list[str]]:
    """A parser for `absl.app.run` to whom what is wrong is an error of one line.

    Args:
      program: name that the errors begin with. Its flags hold a "config" file.
    """

    def parse_flags(argv: Sequence[str]) -> list[str]:
        try:
            rest = flags.FLAGS(argv)
        except (AttributeError, KeyError) as error:
            message: object = error
            while isinstance(message, Exception):  # ml_collections wraps one in another
                message = message.args[0]
            sys.exit(f"{program}: error: no setting {' '.join(str(message).split())}")
        except flags.Error as error:
            *before, last = str(error).strip().splitlines()
            if before and not last.strip().startswith("ValueError: "):
                raise  # a mistake inside the config file, whose place the traceback tells
            sys.exit(f"{program}: error: {last.strip().removeprefix('ValueError: ')}")
        path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
        if not Path(path).is_file():
            sys.exit(f"{program}: error: no config file {path}; the current folder is {Path.cwd()}")
        return rest

    return parse_flags


@contextmanager
def memory_errors(program: str, way_out: str) -> Iterator[None]:
    """Turns a device's lack of memory into an error of two lines.

    Args:
      program: name that the error begins with.
      way_out: which settings need less.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"{program}: error: {str(error).splitlines()[0]}\n{way_out}")


def default_workdir() -> str:
    """`runs/quickstart` for `configs/quickstart.py`, `runs/quickstart-smoke` for its `:smoke`."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    path, _, variant = name.partition(":")
    return f"runs/{Path(path).stem}" + (f"-{Path(variant).name}" if variant else "")
