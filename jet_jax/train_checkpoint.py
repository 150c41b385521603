"""Checkpoints of a training run: everything that an exact continuation needs.

    WORKDIR/checkpoints/STEP/params, config, opt_state, data      (see `jet_jax.checkpoint`)
    WORKDIR/tokenizer/

`params` holds trained and frozen weights alike, so a step is a model that any command takes.
Saving copies the arrays to the host and writes in the background; a step gets its name when all of
it is on disk, so a process killed while writing leaves the step before as the newest.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh
from jaxtyping import PyTree

from jet_jax import checkpoint, hf, io, optim, sharding
from jet_jax.config import ModelConfig
from jet_jax.data import TrainIterator, load_state
from jet_jax.params import flatten, unflatten
from jet_jax.step import TrainState


class TrainCheckpoints:
    """The checkpoints of one workdir.

    Args:
      workdir: the run's directory.
      keep: how many of the newest steps are kept.
    """

    def __init__(self, workdir: str | os.PathLike, keep: int = 2):
        self.workdir = Path(os.path.abspath(workdir))
        self.directory = self.workdir / io.CHECKPOINTS
        handlers: Any = {
            "params": ocp.PyTreeCheckpointHandler(),
            "opt_state": ocp.PyTreeCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers=handlers,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
        )

    @property
    def latest(self) -> int | None:
        """The newest finished step, None where there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        data: TrainIterator,
        model: ModelConfig,
        run: Mapping[str, Any],
    ) -> None:
        """Saves a step, in the background; does nothing if the step is there already.

        Args:
          step: updates done.
          state: the state after them.
          data: the training data, whose next batch is the next step's.
          model: the model.
          run: JSON-safe settings of the run, kept for the reader's sake.
        """
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(flatten(state.all_params())),
                opt_state=ocp.args.PyTreeSave(flat_leaves(state.opt_state)),
                data=grain.checkpoint.CheckpointSave(data),
                config=ocp.args.JsonSave({"model": model.to_dict(), "run": dict(run)}),
            ),
        )

    def resolve_model(self, model: ModelConfig | None, init_from: str) -> ModelConfig:
        """Says which model the run trains: the newest step's, else the one asked for.

        Number formats may differ: they say how a model is computed, not which one it is.

        Args:
          model: the model asked for; None takes the one at `init_from`.
          init_from: model directory that training starts from, or empty.

        Raises:
          ValueError: `model` is not the one of the newest step, or of `init_from`.
        """
        if self.latest is not None:
            saved, where = checkpoint.read_config(self.directory, self.latest), self.workdir
            advice = "Give another --workdir, or that model's config."
        elif init_from:
            saved, where = io.load_config(init_from), init_from
            advice = "Leave config.model out to train the model in init_from."
        else:
            assert model is not None
            return model
        if model is None:
            return saved
        if differences := _differences(saved, model):
            raise ValueError(f"{where} holds another model:\n{differences}\n{advice}")
        return model

    def restore(
        self, state: TrainState, data: TrainIterator, mesh: Mesh, freeze: tuple[str, ...]
    ) -> tuple[TrainState, str]:
        """Restores the newest step, whatever mesh it was saved on.

        Args:
          state: `ShapeDtypeStruct`s of the state to restore.
          data: the training data; moved to the saved place.
          mesh: the mesh to put the arrays on.
          freeze: patterns of frozen paths.

        Returns:
          The state, and a sentence about what could not be continued exactly ("" if all could).

        Raises:
          ValueError: the saved optimizer state or data position does not fit the run.
        """
        step = self.latest
        assert step is not None
        params = restore_arrays(
            self.directory / str(step) / "params", flatten(state.all_params()), mesh
        )
        trainable, frozen = optim.partition(unflatten(params), freeze)
        opt_state = restore_arrays(
            self.directory / str(step) / "opt_state", flat_leaves(state.opt_state), mesh
        )
        leaves, structure = jax.tree_util.tree_flatten_with_path(state.opt_state)
        opt_state = structure.unflatten([opt_state[sharding.dotted(path)] for path, _ in leaves])
        note = restore_data(self.directory / str(step) / "data", data)
        count = jax.device_put(jnp.asarray(step, jnp.int32), sharding.replicated(mesh))
        return TrainState(count, trainable, frozen, opt_state), note

    def save_tokenizer(self, tokenizer: str | os.PathLike) -> None:
        """Puts a copy of the tokenizer beside the checkpoints."""
        target = self.workdir / checkpoint.TOKENIZER
        if not target.is_dir():
            part = target.with_name(f"{target.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # of a run killed while it copied
            if hf.copy_companions(Path(tokenizer), part):
                part.rename(target)

    def wait(self) -> None:
        """Waits until everything that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()


def _differences(there: ModelConfig, here: ModelConfig) -> str:
    then, now = there.to_dict(), here.to_dict()
    skip = ("dtype", "state_dtype", "hf_json")  # how it is computed, not what it is
    return "\n".join(
        f"  {name}: {then[name]!r} there, {now[name]!r} here"
        for name in then
        if name not in skip and then[name] != now[name]
    )


def flat_leaves(tree: PyTree) -> dict[str, Any]:
    """A tree's leaves by dotted path, `mu.layers.3.mixer…` for a moment."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.dotted(path): x for path, x in leaves}


def restore_arrays(
    directory: Path,
    wanted: dict[str, Any],
    mesh: Mesh,
    shardings: Callable[[Any, Mesh], Any] = sharding.shardings,
) -> dict[str, Any]:
    """Reads a flat item whose arrays must be those wanted.

    Args:
      directory: of the item.
      wanted: `ShapeDtypeStruct`s by dotted path.
      mesh: the mesh to put the arrays on.
      shardings: gives each array its place.

    Raises:
      ValueError: names or shapes differ.
    """
    handler = ocp.PyTreeCheckpointHandler()
    saved = handler.metadata(epath.Path(directory)).tree
    differences = [
        f"  {name}: {_shape(saved.get(name))} in the checkpoint, {_shape(wanted.get(name))} here"
        for name in sorted(saved.keys() | wanted.keys())
        if _shape(saved.get(name)) != _shape(wanted.get(name))
    ]
    if differences:
        shown = "\n".join(differences[:8])
        raise ValueError(
            f"{directory} does not fit this run ({len(differences)} differences):\n{shown}\n"
            "The optimizer's kind and optim.freeze must stay as they were; to train on with other "
            "ones, start a new workdir with init_from=OLD_WORKDIR."
        )
    where = shardings(wanted, mesh)
    with ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(
            directory,
            args=ocp.args.PyTreeRestore(
                item=wanted,
                restore_args={
                    name: ocp.ArrayRestoreArgs(sharding=where[name], dtype=x.dtype)
                    for name, x in wanted.items()
                },
            ),
        )


def _shape(x: Any) -> str:
    return "absent" if x is None else str(tuple(x.shape))


def restore_data(directory: Path, data: TrainIterator) -> str:
    """Moves the data to its saved place; a sentence where that cannot be exact, else ""."""
    processes = jax.process_count()
    place = load_state(directory, jax.process_index(), processes)
    if place["process_count"] == processes:
        data.set_state(place)
        return ""
    data.set_state(place, approximate=True)
    return (
        f"The checkpoint was written by {place['process_count']} processes, this run has "
        f"{processes}: the data continues near the saved place, some rows are seen again."
    )
