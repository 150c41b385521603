"""Converts models between Hugging Face directories and Orbax checkpoints, bit for bit.

Stored dtypes are kept and every tensor comes back as it was, and so does the text of config.json.
Nothing is written before all names and shapes are known to be right.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from jet_jax import checkpoint, hf, io
from jet_jax.config import ModelConfig
from jet_jax.directories import check_destination, new_directory
from jet_jax.safetensors_files import TensorSpec
from jet_jax.tensor_files import MAX_SHARD_BYTES

_TIED_HEAD = "stores_tied_head"  # config item: the source had the tied head as a tensor of its own

_BATCH_BYTES = 2**28  # read from Orbax at once: a call costs 20 ms, however small the array


@dataclass(frozen=True)
class _Source:
    """A model on disk that is checked but not read.

    `read` gives one weight, `views` all of them, in our layout; the latter are lazy for a Hugging
    Face directory.
    """

    config: ModelConfig
    specs: dict[str, TensorSpec]
    read: Callable[[str], np.ndarray]
    views: Callable[[], dict[str, np.ndarray]]
    companions: Path | None
    stores_tied_head: bool


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    console: Console | None = None,
) -> None:
    """Converts a model.

    Args:
      src: a Hugging Face directory, a converted directory, a training run's directory or one of
        its steps.
      dst: the directory to be; it is whole or not there.
      to: "hf" or "orbax"; None takes the one that the source is not.
      overwrite: whether an existing model directory may be replaced.
      max_shard_bytes: the most bytes of weights in one file of a Hugging Face directory.
      console: where progress is shown; None takes standard error.

    Raises:
      ValueError: before anything is written, if the source is no model, its weights are not those
        of its config, the destination exists, or one directory lies in the other.
    """
    if to not in (None, "hf", "orbax"):
        raise ValueError(f"to={to!r}; expected 'hf' or 'orbax'")
    _check_apart(Path(src), Path(dst))
    check_destination(dst, overwrite=overwrite)
    kind, where = io.kind_of(src)
    to = to or ("orbax" if kind == "hf" else "hf")
    source = _open_hf(where) if kind == "hf" else _open_orbax(where)
    total = sum(spec.nbytes for spec in source.specs.values())
    console = console or Console(stderr=True)
    if to == "orbax":
        with console.status(f"Writing {total / 1e9:.2f} GB to {dst}"):
            checkpoint.save_model(
                dst,
                source.config,
                source.views(),
                source.companions,
                overwrite=overwrite,
                record={_TIED_HEAD: source.stores_tied_head},
            )
        return
    columns = (TextColumn("Writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console) as progress,
        new_directory(dst, overwrite=overwrite) as work,
    ):
        task = progress.add_task("", total=total)
        hf.write_hf(
            work,
            source.config,
            source.specs,
            source.read,
            store_tied_head=source.stores_tied_head,
            companions=source.companions,
            max_shard_bytes=max_shard_bytes,
            progress=lambda nbytes: progress.advance(task, nbytes),
        )


def _open_hf(directory: Path) -> _Source:
    opened = hf.open_hf(directory)
    return _Source(
        config=opened.config,
        specs=opened.specs,
        read=opened.reader(),
        views=lambda: {path: view for views in opened.views() for path, view in views.items()},
        companions=directory,
        stores_tied_head=opened.stores_tied_head,
    )


def _open_orbax(step: Path) -> _Source:
    record = checkpoint.read_record(step)
    specs = checkpoint.read_specs(step)
    return _Source(
        config=checkpoint.read_config(step),
        specs=specs,
        read=_batched_reader(step, specs),
        views=lambda: checkpoint.read_arrays(step, list(specs)),
        companions=io.tokenizer_dir(step),
        stores_tied_head=bool(record.get(_TIED_HEAD)),
    )


def _batched_reader(step: Path, specs: dict[str, TensorSpec]) -> Callable[[str], np.ndarray]:
    """Returns a function that reads weights in order, some of the following ones with each."""
    names = list(specs)
    ahead: dict[str, np.ndarray] = {}

    def read(name: str) -> np.ndarray:
        if name not in ahead:
            ahead.clear()
            batch, nbytes = [name], specs[name].nbytes
            for following in names[names.index(name) + 1 :]:
                nbytes += specs[following].nbytes
                if nbytes > _BATCH_BYTES:
                    break
                batch.append(following)
            ahead.update(checkpoint.read_arrays(step, batch))
        return ahead.pop(name)

    return read


def _check_apart(src: Path, dst: Path) -> None:
    """Raises ValueError if one directory is the other or lies in it."""
    src, dst = src.resolve(), dst.resolve()
    if src == dst or src in dst.parents or dst in src.parents:
        raise ValueError(f"source {src} and destination {dst} overlap; choose another destination")
