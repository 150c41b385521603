"""Writes a directory so that it is either whole or not there.

Everything goes into a hidden sibling, `.NAME.incomplete-XXXXXXXX`, which takes its name only when
all of it is on the disk. A write that is cut short leaves at most such a sibling, which no loader
accepts and the next write to the same place points out.
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import logging

_INCOMPLETE = re.compile(r"\..+\.(incomplete|replaced)-\w+")
_MODEL_MARKS = ("config.json", "0/params")  # a Hugging Face directory, a converted one


def check_destination(path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Checks that a directory may be written.

    Args:
      path: the directory to be.
      overwrite: whether it may replace a model directory.

    Returns:
      The absolute path.

    Raises:
      ValueError: it exists and `overwrite` is false, or it holds something else than one model
        (overwriting must not delete a home directory or a training run).
    """
    path = Path(os.path.abspath(path))
    if not os.path.lexists(path):
        return path
    if not overwrite:
        raise ValueError(f"{path} already exists; choose another destination, or pass --overwrite")
    if not path.is_dir() or path.is_symlink():
        raise ValueError(f"{path} is not a directory; overwrite replaces model directories only")
    is_training = any(path.glob("*/opt_state"))
    if any(path.iterdir()) and (is_training or not any((path / m).exists() for m in _MODEL_MARKS)):
        what = "a training run" if is_training else "something else than a model"
        raise ValueError(
            f"{path} holds {what}; overwrite replaces model directories only. Remove it yourself, "
            "or choose another destination"
        )
    return path


@contextlib.contextmanager
def new_directory(path: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a temporary directory that becomes `path` when the block ends without an error.

    Args:
      path: the directory to be; its parents are made.
      overwrite: whether it may replace a model directory. The old one stays in place until the new
        one is whole.

    Yields:
      The directory to write into.

    Raises:
      ValueError: see `check_destination`.
    """
    path = check_destination(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers(path):
        logging.warning("%s is left from a write that was cut short; delete it", left)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.incomplete-", dir=path.parent))
    try:
        yield work
        work.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        _sync(work)
        _swap(work, path, overwrite)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def leftovers(path: str | os.PathLike) -> list[Path]:
    """Lists what earlier writes of `path`, cut short, have left beside it."""
    path = Path(os.path.abspath(path))
    return sorted(
        entry
        for entry in path.parent.glob(f".{path.name}.*")
        if is_leftover(entry) and entry.name.rsplit(".", 1)[0] == f".{path.name}"
    )


def is_leftover(path: str | os.PathLike) -> bool:
    """Tells whether a path is, or is inside, the unfinished part of a write."""
    return any(_INCOMPLETE.fullmatch(part) for part in Path(os.path.abspath(path)).parts)


def _swap(work: Path, path: Path, overwrite: bool) -> None:
    """Gives the finished directory its name."""
    old = None
    if overwrite and path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.replaced-", dir=path.parent))
        os.rename(path, old)  # onto the empty directory just made
    try:
        os.rename(work, path)
    except OSError as error:
        if old is not None:
            os.rename(old, path)
        raise ValueError(f"{path} appeared while its replacement was written ({error})") from error
    _sync_one(path.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(directory: Path) -> None:
    """Makes sure that a directory's files and names are on the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            _sync_one(Path(root) / name)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
