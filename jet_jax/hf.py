"""Hugging Face model directories: opens, loads and writes them.

Names and layouts are in `hf_names`, weight files in `tensor_files`, all other files in `hf_files`.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from jet_jax.config import ModelConfig
from jet_jax.hf_files import config_text, copy_companions, read_config
from jet_jax.hf_names import (
    HEAD,
    KNOWN_BUFFERS,
    Layout,
    embedding_name,
    expected,
    hf_specs,
    renames_of,
)
from jet_jax.models.lm import HybridLM
from jet_jax.placing import build, check_dtype, place, targets, weight_specs, with_dtype
from jet_jax.safetensors_files import TensorSpec
from jet_jax.tensor_files import (
    MAX_SHARD_BYTES,
    TensorFiles,
    open_tensor_files,
    read_tensor_file,
    write_tensor_files,
    write_text,
)
from jet_jax.weight_checks import check_weights

_THREADS = 8  # that many weights are on their way to the devices at a time


@dataclass(frozen=True)
class HFModel:
    """A Hugging Face directory whose weights are known to be those of its config.

    Attributes:
      directory: the directory.
      config: the model.
      files: its tensors.
      names: Hugging Face name → (our dotted path, layout there, our shape).
      stores_tied_head: the files hold `lm_head.weight` although it equals the embedding.
    """

    directory: Path
    config: ModelConfig
    files: TensorFiles
    names: dict[str, tuple[str, Layout, tuple[int, ...]]]
    stores_tied_head: bool

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Shape (ours) and stored dtype by our dotted path."""
        return {
            path: TensorSpec(shape, self.files.specs[name].dtype)
            for name, (path, _, shape) in self.names.items()
        }

    def views(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields, file by file, lazy read-only views in our layout by our dotted path.

        A view keeps its whole file mapped: copy what is to outlive the step of the iteration.
        """
        for file in self.files.files:
            arrays = read_tensor_file(file)
            entries = {name: self.names[name] for name in arrays if name in self.names}
            yield {
                path: layout.to_ours(arrays[name], shape)
                for name, (path, layout, shape) in entries.items()
            }

    def reader(self) -> Callable[[str], np.ndarray]:
        """Returns a function from our dotted path to a lazy view in our layout."""
        by_path = {entry[0]: (name, *entry[1:]) for name, entry in self.names.items()}
        read_file = self.files.reader()

        def read(path: str) -> np.ndarray:
            name, layout, shape = by_path[path]
            return layout.to_ours(read_file(name), shape)

        return read


def open_hf(directory: str | os.PathLike) -> HFModel:
    """Opens a Hugging Face directory and checks all names and shapes; reads no weights.

    Args:
      directory: the directory.

    Returns:
      The opened model.

    Raises:
      ValueError: see `read_config`, `open_tensor_files` and `check_weights`; also a tied model
        with an `lm_head.weight` that differs from its embedding.
    """
    directory = Path(directory)
    config = read_config(directory)
    files = open_tensor_files(directory)
    names, embedding = expected(config), embedding_name(config)
    stores_tied_head = config.tie_word_embeddings and HEAD in files.specs
    shapes = {name: layout.hf_shape(shape) for name, (_, layout, shape) in names.items()}
    found = {name: spec for name, spec in files.specs.items() if not KNOWN_BUFFERS.search(name)}
    if stores_tied_head:
        shapes[HEAD] = shapes[embedding]
    model_type = json.loads(config.hf_json or "{}").get("model_type")
    check_weights(shapes, found, str(directory), f"{model_type}, {config.num_layers} layers")
    if stores_tied_head and not _equal_bits(files.reader()(HEAD), files.reader()(embedding)):
        raise ValueError(
            f"{directory}: config.json says tie_word_embeddings, but {HEAD} differs from "
            f"{embedding}; set tie_word_embeddings to false in config.json, or remove {HEAD}"
        )
    return HFModel(directory, config, files, names, stores_tied_head)


def load(
    directory: str | os.PathLike, dtype: str | None = None, mesh: Mesh | None = None
) -> HybridLM:
    """Loads a Hugging Face directory.

    Args:
      directory: a directory with config.json and weights, of a model type that
        `ModelConfig.from_hf` supports.
      dtype: "bfloat16" or "float32": dtype of the weights and of the computation. None keeps the
        stored dtypes and computes in the dtype of the config. `A_log`, `dt_bias` and Mamba2's `D`
        are float32 in every case.
      mesh: the mesh that the weights are spread over, by `sharding.RULES`; None puts all of them
        on the default device.

    Returns:
      The `HybridLM`.

    Raises:
      ValueError: before any weight is read, if config and weights do not fit; see `open_hf`.
    """
    check_dtype(dtype)
    opened = open_hf(directory)
    config = with_dtype(opened.config, dtype)
    stored = {path: spec.dtype for path, spec in opened.specs.items()}
    wanted = targets(config, stored, dtype, mesh)
    params = {}
    with ThreadPoolExecutor(_THREADS) as pool:  # transposing is slow, and numpy lets go of the GIL
        for views in opened.views():
            placed = pool.map(place, views.values(), [wanted[path] for path in views])
            params |= zip(views, placed, strict=True)
    return build(config, params)


def write_hf(
    directory: Path,
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
    *,
    dtype: str | None = None,
    store_tied_head: bool = False,
    companions: str | os.PathLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Writes a Hugging Face directory into an existing, empty one.

    Args:
      directory: where to write.
      config: the model.
      specs: our shape and dtype by our dotted path.
      read: gives the array, in our layout, of a dotted path.
      dtype: what config.json is to say about the weights' dtype; None leaves it as it is.
      store_tied_head: write a tied head once more as `lm_head.weight`, as some checkpoints do.
      companions: directory with tokenizer and other files to copy along.
      max_shard_bytes: the most bytes of weights in a file.
      progress: called with the bytes of each tensor as it is written.

    Raises:
      ValueError: the weights are not those of the config.
    """
    shapes = {path: spec.shape for path, spec in weight_specs(config).items()}
    check_weights(shapes, specs, "memory", f"{config.num_layers} layers")
    names = hf_specs(dict(specs), renames_of(config))
    if store_tied_head and HEAD not in names:
        names[HEAD] = names[embedding_name(config)]

    def read_hf(name: str) -> np.ndarray:
        path, layout, _ = names[name]
        return layout.to_hf(read(path))

    write_tensor_files(
        directory,
        {name: spec for name, (_, _, spec) in names.items()},
        read_hf,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    if companions is not None:
        copy_companions(companions, directory)
    # Last: without its config.json nothing takes the directory for a model.
    write_text(directory / "config.json", config_text(config, dtype))


def _equal_bits(left: np.ndarray, right: np.ndarray) -> bool:
    """Compares two arrays bit by bit, block by block (NaN equals NaN, no copy of the whole)."""
    if left.dtype != right.dtype:
        return False
    rows = max(1, 2**24 // max(1, left[:1].nbytes))
    return all(
        left[i : i + rows].tobytes() == right[i : i + rows].tobytes()
        for i in range(0, len(left), rows)
    )
