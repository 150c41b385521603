"""Finds, reads and writes the weight files of a Hugging Face directory.

A directory holds one weight file or several with an index. Only headers are read until a tensor
is asked for, and the mapping of a file is released when the next file is reached, so the host
holds about one shard at a time.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jet_jax.safetensors_files import TensorSpec, read_safetensors, write_safetensors
from jet_jax.torch_pickle import read_torch

MAX_SHARD_BYTES = 5_000_000_000
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_NOT_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one model, over one or several files.

    Attributes:
      files: the weight files, in the order in which they are read.
      specs: shape and dtype of every tensor, by name.
      location: the file of every tensor, by name.
    """

    files: tuple[Path, ...]
    specs: dict[str, TensorSpec]
    location: dict[str, Path]

    def reader(self) -> Callable[[str], np.ndarray]:
        """Returns a function from a name to a lazy read-only view.

        It keeps the file of the last view open, no other.
        """
        last: tuple[Path | None, dict[str, np.ndarray]] = (None, {})

        def read(name: str) -> np.ndarray:
            nonlocal last
            path = self.location[name]
            if last[0] != path:
                last = (path, read_tensor_file(path))
            return last[1][name]

        return read


def read_tensor_file(path: Path) -> dict[str, np.ndarray]:
    """Opens one weight file, of either kind, without reading its data.

    Args:
      path: a `.safetensors` file or one of PyTorch.

    Returns:
      Lazy read-only arrays by name.

    Raises:
      ValueError: see `read_safetensors` and `read_torch`.
    """
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)


def weight_files(directory: str | os.PathLike) -> list[Path]:
    """Finds the weight files of a Hugging Face directory; safetensors win over PyTorch files.

    Args:
      directory: the directory.

    Returns:
      The files: one, or those that the index names, sorted by name.

    Raises:
      ValueError: there are none, or shards that the index names are missing.
    """
    return _find(Path(directory))[0]


def open_tensor_files(directory: str | os.PathLike) -> TensorFiles:
    """Opens the weights of a Hugging Face directory; reads headers only.

    Args:
      directory: the directory, with `model.safetensors`, `pytorch_model.bin`, shards of either
        with their index, or a single weight file of another name.

    Returns:
      The tensors' names, shapes, dtypes and places.

    Raises:
      ValueError: no weights, a missing shard, a tensor in two shards, an index that does not
        agree with its shards, or an unreadable file.
    """
    directory = Path(directory)
    files, weight_map = _find(directory)
    specs: dict[str, TensorSpec] = {}
    location: dict[str, Path] = {}
    for path in files:
        for name, array in read_tensor_file(path).items():
            if name in location:
                raise ValueError(
                    f"tensor {name!r} is in both {location[name].name} and {path.name} of "
                    f"{directory}; remove the file that does not belong there"
                )
            specs[name] = TensorSpec(array.shape, array.dtype)
            location[name] = path
    if weight_map is not None:
        wrong = sorted(
            name
            for name in weight_map.keys() | location.keys()
            if name not in location or location[name].name != weight_map.get(name)
        )
        if wrong:
            raise ValueError(
                f"the index of {directory} and its shards disagree about {len(wrong)} tensors, "
                f"such as {', '.join(wrong[:5])}; download the directory again"
            )
    return TensorFiles(tuple(files), specs, location)


def write_tensor_files(
    directory: str | os.PathLike,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], object] | None = None,
) -> list[Path]:
    """Writes safetensors shards and, if there are several, their index, as Hugging Face does.

    Args:
      directory: an existing directory.
      specs: shape and dtype by name, in the order of writing.
      read: gives the tensor of a name.
      max_shard_bytes: the most tensor bytes that a file holds; a larger tensor gets its own file.
      progress: called with the bytes of each tensor as it is written.

    Returns:
      The files written.
    """
    directory = Path(directory)
    shards = plan_shards(specs, max_shard_bytes)

    def read_and_count(name: str) -> np.ndarray:
        if progress is not None:
            progress(specs[name].nbytes)
        return read(name)

    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, {n: specs[n] for n in names}, read_and_count)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(spec.nbytes for spec in specs.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_text(directory / _INDEXED[0], json.dumps(index, indent=2) + "\n")
    return [directory / file for file in sorted(set(weight_map.values()))]


def plan_shards(specs: Mapping[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Splits tensors over files, in order.

    Args:
      specs: shape and dtype by name.
      max_shard_bytes: the most bytes in a file, unless a single tensor is larger.

    Returns:
      The names of each file; one empty list if there are no tensors.

    Raises:
      ValueError: `max_shard_bytes` is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}; expected a positive number of bytes")
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.nbytes > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.nbytes
    return shards


def write_text(path: Path, text: str) -> None:
    """Writes a text file and makes sure that it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _find(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Returns the weight files and, if there is an index, its map of tensor to file name."""
    # Hugging Face's own order: safetensors first, a single file before an index.
    for single, indexed in zip(_SINGLE, _INDEXED, strict=True):
        if (directory / single).is_file():
            return [directory / single], None
        if (directory / indexed).is_file():
            return _read_index(directory / indexed)
    found = sorted(
        path
        for path in directory.iterdir()
        if path.is_file() and path.suffix in _SUFFIXES and path.name not in _NOT_WEIGHTS
    )
    for kinds in ((".safetensors",), (".bin", ".pt", ".pth")):
        files = [path for path in found if path.suffix in kinds]
        if len(files) == 1:
            return files, None
        if files:
            raise ValueError(
                f"{directory} has {len(files)} weight files ({files[0].name}, ...) and no index; "
                f"expected {_SINGLE[0]}, or shards with {_INDEXED[0]}"
            )
    raise ValueError(
        f"{directory} has no weights; expected {_SINGLE[0]}, {_SINGLE[1]}, or shards with "
        f"{_INDEXED[0]} or {_INDEXED[1]}"
    )


def _read_index(path: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a weight index: no valid weight_map") from error
    odd = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if odd:
        raise ValueError(f"{path} names files outside its own directory: {odd[0]!r}")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{path.parent} lacks {len(missing)} of the {len(names)} weight files of its index: "
            f"{', '.join(missing)}; download them"
        )
    return [path.parent / name for name in names], weight_map
