"""Loads and saves whole models, whatever the directory: the two functions that users call.

A model is a Hugging Face directory, a converted directory, a training run's directory or one of
its steps. What a directory is follows from what is in it.
"""

import os
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jet_jax import checkpoint, hf
from jet_jax.config import ModelConfig
from jet_jax.directories import is_leftover, new_directory
from jet_jax.models.lm import HybridLM
from jet_jax.params import flatten, split
from jet_jax.placing import build
from jet_jax.safetensors_files import TensorSpec

CHECKPOINTS = "checkpoints"  # a training run's steps may lie in a folder of this name


def kind_of(path: str | os.PathLike) -> tuple[Literal["hf", "orbax"], Path]:
    """Tells what a model directory is.

    Args:
      path: a Hugging Face directory, a converted directory, a training run's or one of its steps.

    Returns:
      "hf" and the directory, or "orbax" and the directory of the newest (or given) step.

    Raises:
      ValueError: it is none of these; the message says what is wrong.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; expected a model directory")
    if is_leftover(path):
        raise ValueError(f"{path} is the unfinished part of a write that was cut short; delete it")
    if (path / "config.json").is_file():
        return "hf", path
    for candidate in (path, path / CHECKPOINTS):
        if checkpoint.is_step(candidate) or checkpoint.steps(candidate):
            return "orbax", checkpoint.find_step(candidate)
    raise ValueError(
        f"{path} holds no model: neither a config.json (a Hugging Face directory) nor a finished "
        "checkpoint (a converted model or a training run)"
    )


def load(
    path: str | os.PathLike, dtype: str | None = "bfloat16", mesh: Mesh | None = None
) -> HybridLM:
    """Loads a model.

    Args:
      path: a Hugging Face directory, a converted directory, a training run's directory (its newest
        step is taken) or one of its steps.
      dtype: "bfloat16" or "float32": dtype of the weights and of the computation. None keeps the
        stored dtypes and computes in the dtype of the config. `A_log`, `dt_bias` and Mamba2's `D`
        are float32 in every case.
      mesh: the mesh that the weights are spread over, by `sharding.RULES`; each weight lands
        directly in its sharding. None puts all of them on the default device.

    Returns:
      The model; its config is `model.config`.

    Raises:
      ValueError: the directory holds no model, one that is not supported, or weights that are not
        those of its config. Nothing is read before that is known.
    """
    kind, where = kind_of(path)
    if kind == "hf":
        return hf.load(where, dtype, mesh)
    config, params = checkpoint.restore_params(where, dtype=dtype, mesh=mesh)
    return build(config, flatten(params))


def load_config(path: str | os.PathLike) -> ModelConfig:
    """Reads only the config of a model directory; arguments and errors as in `load`."""
    kind, where = kind_of(path)
    return hf.read_config(where) if kind == "hf" else checkpoint.read_config(where)


def tokenizer_dir(path: str | os.PathLike) -> Path | None:
    """Finds a model's tokenizer.

    Args:
      path: as in `load`.

    Returns:
      The directory with the tokenizer (and generation config), or None where there is none.

    Raises:
      ValueError: the directory holds no model.
    """
    kind, where = kind_of(path)
    if kind == "hf":
        return where if any(where.glob("tokenizer*")) else None
    for above in (where.parent, where.parent.parent):
        if (above / checkpoint.TOKENIZER).is_dir():
            return above / checkpoint.TOKENIZER
    return None


def save(
    model: HybridLM,
    path: str | os.PathLike,
    format: str = "hf",
    *,
    overwrite: bool = False,
    tokenizer_dir: str | os.PathLike | None = None,
) -> None:
    """Saves a model; the directory is whole or not there.

    Args:
      model: the model; weights keep their dtypes.
      path: the directory to be.
      format: "hf", a Hugging Face directory (of model_type jet_jax_hybrid where no published
        architecture holds the model), or "orbax", as `jet-jax convert` makes it.
      overwrite: whether an existing model directory may be replaced.
      tokenizer_dir: directory whose tokenizer and generation config are copied along.

    Raises:
      ValueError: an unknown format, an existing destination, weights that are not those of
        `model.config`, or several processes.
    """
    if format not in ("hf", "orbax"):
        raise ValueError(f"format={format!r}; expected 'hf' or 'orbax'")
    if jax.process_count() > 1:
        raise ValueError(
            "save writes from one process; with several, save a training checkpoint and convert it "
            "on one of them"
        )
    _, params = split(model)
    if format == "orbax":
        checkpoint.save_model(path, model.config, params, tokenizer_dir, overwrite=overwrite)
        return
    flat = flatten(params)
    specs = {name: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for name, x in flat.items()}
    with new_directory(path, overwrite=overwrite) as work:
        hf.write_hf(
            work,
            model.config,
            specs,
            lambda name: np.asarray(flat[name]),
            dtype=specs["embed_tokens.embedding"].dtype.name,
            companions=tokenizer_dir,
        )
