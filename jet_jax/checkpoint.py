"""Model weights in Orbax checkpoints: the format of converted models and of training runs.

    DIR/<step>/params     flat {dotted path: array}, always one entry a layer
    DIR/<step>/config     JSON, {"model": ModelConfig.to_dict(), ...}
    DIR/<step>/opt_state, data     training runs only
    DIR/tokenizer/        tokenizer and generation config, as Hugging Face names them

A converted model has the one step 0. Paths are flat because Orbax gives back string keys: a nested
dict would come back with its layers in the order 0, 1, 10, 11, 2.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from jet_jax.config import ModelConfig
from jet_jax.directories import new_directory
from jet_jax.hf import copy_companions
from jet_jax.params import flatten, unflatten
from jet_jax.placing import check_dtype, targets, weight_specs, with_dtype
from jet_jax.safetensors_files import TensorSpec
from jet_jax.weight_checks import check_weights

TOKENIZER = "tokenizer"


def steps(path: str | os.PathLike) -> list[int]:
    """Lists the finished steps of a checkpoint directory.

    Args:
      path: the directory.

    Returns:
      Step numbers, ascending; empty where there are none or no such directory.
    """
    path = Path(path)
    if not path.is_dir():
        return []
    # Orbax gives a step its plain number only when all of it is written.
    return sorted(int(p.name) for p in path.iterdir() if p.name.isdigit() and is_step(p))


def is_step(path: str | os.PathLike) -> bool:
    """Tells whether a path is one finished step, with its config and weights."""
    path = Path(path)
    return path.name.isdigit() and (path / "params").is_dir() and (path / "config").is_dir()


def find_step(path: str | os.PathLike, step: int | None = None) -> Path:
    """Finds the step to read.

    Args:
      path: a checkpoint directory, or one of its steps.
      step: the step; None takes the newest.

    Returns:
      The step's directory.

    Raises:
      ValueError: there is no such step; the message lists those that there are.
    """
    path = Path(os.path.abspath(path))
    if is_step(path) and step in (None, int(path.name)):
        return path
    have = steps(path)
    if not have:
        raise ValueError(f"{path} holds no finished checkpoint")
    if step is not None and step not in have:
        raise ValueError(f"{path} has no step {step}; it has {', '.join(map(str, have))}")
    return path / str(have[-1] if step is None else step)


def read_record(path: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """Reads the `config` item of a step.

    Args:
      path: a checkpoint directory, or one of its steps.
      step: the step; None takes the newest.

    Returns:
      The JSON object; its `model` is a `ModelConfig.to_dict()`.

    Raises:
      ValueError: there is no such step, or it describes no model.
    """
    where = find_step(path, step)
    try:
        record = json.loads((where / "config" / "metadata").read_text(encoding="utf-8"))
        ModelConfig.from_dict(record["model"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: its config item describes no model ({error})") from error
    return record


def read_config(path: str | os.PathLike, step: int | None = None) -> ModelConfig:
    """Reads the model of a step; arguments and errors as in `read_record`."""
    return ModelConfig.from_dict(read_record(path, step)["model"])


def read_specs(path: str | os.PathLike, step: int | None = None) -> dict[str, TensorSpec]:
    """Reads names, shapes and dtypes of a step's weights, and checks them against its config.

    Args:
      path: a checkpoint directory, or one of its steps.
      step: the step; None takes the newest.

    Returns:
      Shape and stored dtype by dotted path.

    Raises:
      ValueError: the weights are not those of the config.
    """
    where = find_step(path, step)
    config = read_config(where)
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(where / "params")).tree
    found = {name: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for name, x in tree.items()}
    shapes = {name: spec.shape for name, spec in weight_specs(config).items()}
    check_weights(shapes, found, str(where), f"{config.num_layers} layers")
    return {name: found[name] for name in shapes}


def restore_params(
    path: str | os.PathLike,
    step: int | None = None,
    dtype: str | None = None,
    mesh: Mesh | None = None,
) -> tuple[ModelConfig, dict[Any, Any]]:
    """Reads a step's weights, each straight into its sharding.

    Args:
      path: a checkpoint directory, or one of its steps.
      step: the step; None takes the newest.
      dtype: "bfloat16" or "float32", for weights and computation; None keeps what is stored.
      mesh: the mesh that the weights are spread over; None puts them on the default device. It
        need not be the one that they were saved on.

    Returns:
      The model and its weights as a nested dict with int layer numbers.

    Raises:
      ValueError: there is no such step, or its weights are not those of its config.
    """
    check_dtype(dtype)
    where = find_step(path, step)
    config = with_dtype(read_config(where), dtype)
    stored = {name: spec.dtype for name, spec in read_specs(where).items()}
    wanted = targets(config, stored, dtype, mesh)
    with _checkpointer() as checkpointer:
        flat = checkpointer.restore(
            where / "params",
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args={
                    name: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype)
                    for name, x in wanted.items()
                },
            ),
        )
    return config, unflatten({name: flat[name] for name in wanted})


def read_arrays(path: str | os.PathLike, names: list[str]) -> dict[str, np.ndarray]:
    """Reads some weights of a step into host memory, as they are stored.

    Args:
      path: one step.
      names: dotted paths.

    Returns:
      The arrays by dotted path.
    """
    with _checkpointer() as checkpointer:
        return checkpointer.restore(
            find_step(path) / "params",
            args=ocp.args.PyTreeRestore(
                item=dict.fromkeys(names, 0),
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names},
                partial_restore=True,
            ),
        )


def save_model(
    path: str | os.PathLike,
    config: ModelConfig,
    params: Mapping[Any, Any],
    tokenizer_dir: str | os.PathLike | None = None,
    *,
    overwrite: bool = False,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model as a checkpoint directory with the one step 0; whole or not at all.

    Args:
      path: the directory to be.
      config: the model.
      params: its weights, JAX or numpy arrays, nested or flat; dtypes are kept.
      tokenizer_dir: directory whose tokenizer and generation config are copied along.
      overwrite: whether an existing model directory may be replaced.
      record: further entries of the `config` item.

    Raises:
      ValueError: the destination exists, the weights are not those of the config, or there are
        several processes.
    """
    if jax.process_count() > 1:
        raise ValueError(
            "save_model writes from one process; with several, save a training checkpoint and "
            "convert it on one of them"
        )
    flat = flatten(params)
    shapes = {name: spec.shape for name, spec in weight_specs(config).items()}
    given = {name: TensorSpec(tuple(x.shape), np.dtype(x.dtype)) for name, x in flat.items()}
    check_weights(shapes, given, "memory", f"{config.num_layers} layers")
    with new_directory(path, overwrite=overwrite) as work:
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        handlers = {"params": _lean_handler(), "config": ocp.JsonCheckpointHandler()}
        with ocp.CheckpointManager(work, options=options, item_handlers=handlers) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(flat),
                    config=ocp.args.JsonSave({"model": config.to_dict(), **(record or {})}),
                ),
            )
        for mark in work.rglob("commit_success.txt"):
            # On a bucket Orbax asks for this file; its text names the folder written in.
            mark.write_bytes(b"")
        if tokenizer_dir is not None:
            copy_companions(tokenizer_dir, work / TOKENIZER)


def _lean_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns a handler that copies no host array before it writes it, unlike the default one.

    The copy guards against changes during an asynchronous save; ours waits.
    """
    try:
        numpy_handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    except TypeError:  # Orbax before 0.12.8 always copies
        numpy_handler = ocp.type_handlers.NumpyHandler()
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, numpy_handler),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    return ocp.PyTreeCheckpointHandler(save_concurrent_gb=1, type_handler_registry=registry)


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
