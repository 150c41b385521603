"""The loop of a training stage: steps, records, checkpoints, and going on where a kill left it.

    WORKDIR/STAGE/checkpoints/STEP/{trained, opt_state, data}     the newest two
    WORKDIR/STAGE/metrics.jsonl, tensorboard/

The teacher's frozen weights are not saved: they are where the search's config says.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from jet_jax import io, metrics, sharding
from jet_jax.data import TrainIterator
from jet_jax.params import flatten, unflatten
from jet_jax.postnas import supernet
from jet_jax.progress import Display
from jet_jax.step import TrainState
from jet_jax.stopping import StopRequest
from jet_jax.train_checkpoint import flat_leaves, restore_arrays, restore_data

Shardings = Callable[[Any, Mesh], Any]


class Stopped(Exception):
    """The run was asked to stop; what was done is saved."""


class StageCheckpoints:
    """The checkpoints of one stage: what it trains, the optimizer's state and the data's place."""

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 2,
        shardings: Shardings = supernet.shardings,
    ):
        self._shardings = shardings
        self.directory = Path(os.path.abspath(directory)) / io.CHECKPOINTS
        handlers: Any = {
            "trained": ocp.PyTreeCheckpointHandler(),
            "opt_state": ocp.PyTreeCheckpointHandler(),
            "data": grain.checkpoint.CheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            self.directory, item_handlers=handlers, options=options
        )

    @property
    def latest(self) -> int | None:
        """The newest finished step, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data: TrainIterator) -> None:
        """Saves a step, in the background."""
        if step == self.latest:
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                trained=ocp.args.PyTreeSave(flatten(state.params)),
                opt_state=ocp.args.PyTreeSave(flat_leaves(state.opt_state)),
                data=grain.checkpoint.CheckpointSave(data),
            ),
        )

    def trained(self, shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, Any]:
        """The newest step's trained weights.

        Args:
          shapes: `ShapeDtypeStruct`s or arrays of them.
          mesh: the mesh to put them on.

        Raises:
          ValueError: there is no step, or its arrays do not fit.
        """
        if self.latest is None:
            raise ValueError(f"{self.directory} holds no finished step; run the stage before it")
        folder = self.directory / str(self.latest)
        wanted = flatten(jax.tree.map(_shape, dict(shapes)))
        return unflatten(restore_arrays(folder / "trained", wanted, mesh, self._shardings))

    def restore(self, state: TrainState, data: TrainIterator, mesh: Mesh) -> tuple[TrainState, str]:
        """The newest step, and a sentence about what could not be continued exactly."""
        trained = self.trained(state.params, mesh)
        folder = self.directory / str(self.latest)
        shapes = jax.tree.map(_shape, state.opt_state)
        saved = restore_arrays(folder / "opt_state", flat_leaves(shapes), mesh, self._shardings)
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        opt_state = structure.unflatten([saved[sharding.dotted(path)] for path, _ in leaves])
        note = restore_data(folder / "data", data)
        count = jax.device_put(jnp.asarray(self.latest, jnp.int32), sharding.replicated(mesh))
        return TrainState(count, trained, state.frozen, opt_state), note

    def close(self) -> None:
        """Waits for what is being written."""
        self._manager.close()


@dataclass(frozen=True)
class Loop:
    """A stage's loop.

    Attributes:
      name: of the stage, for lines on the screen.
      directory: what it writes to.
      steps: of the whole stage.
      mesh: device mesh.
      batch_tokens: positions of a batch, for the throughput.
      flops_per_token: of a step, for the share of the device's peak.
      log_every: steps between records.
      checkpoint_every: steps between checkpoints; 0 for none but the last.
      shardings: gives what trains and its optimizer state their places on the mesh.
    """

    name: str
    directory: Path
    steps: int
    mesh: Mesh
    batch_tokens: int
    flops_per_token: float
    log_every: int
    checkpoint_every: int
    shardings: Shardings = supernet.shardings

    def run(self, state: TrainState, step: Any, data: TrainIterator) -> TrainState:
        """Trains to the last step.

        Args:
          state: at the stage's start; replaced by the newest checkpoint where there is one.
          step: `(state, batch) -> (state, metrics)`, such as `training.make_align_step` makes.
          data: the batches, from their beginning.

        Raises:
          Stopped: after SIGTERM or Ctrl-C, when the step in hand is saved, be it the last.
          FloatingPointError: loss or gradient are no numbers any more; nothing is saved then.
        """
        checkpoints = StageCheckpoints(self.directory, shardings=self.shardings)
        with closing(checkpoints), jax.set_mesh(self.mesh):
            start = checkpoints.latest or 0
            display = Display(self.steps, start)
            with closing(display), closing(StopRequest()) as stop:
                if start:
                    state, note = checkpoints.restore(state, data, self.mesh)
                    display.say(f"{self.name}: going on from step {start} of {self.steps}. {note}")
                writer = metrics.MetricWriter(self.directory, start)
                with closing(writer):
                    return self._loop(state, step, data, checkpoints, display, stop, writer, start)

    def _loop(self, state, step, data, checkpoints, display, stop, writer, start):
        speed = metrics.Throughput(self.flops_per_token, metrics.peak_flops())
        recorded, stopping = start, False
        for n in range(start + 1, self.steps + 1):
            state, values = step(state, sharding.put_batch(next(data), self.mesh))
            display.step(n)
            stopping = stop.at(n)
            last = n == self.steps
            saves = last or stopping or (self.checkpoint_every and n % self.checkpoint_every == 0)
            if saves or n % self.log_every == 0 or n == start + 1:
                values = {k: np.asarray(v).tolist() for k, v in values.items()}
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(values[name]):
                        raise FloatingPointError(
                            f"{self.name}: {name} is {values[name]} at step {n}"
                        )
                values |= speed.lap(n - recorded, (n - recorded) * self.batch_tokens)
                recorded = n
                writer.write(n, "train", values | metrics.memory_bytes())
                display.train(n, values)
            if saves:
                checkpoints.save(n, state, data)
            if stopping:
                break
        if stopping or stop.name:  # by name: asked while the last step was waited for
            raise Stopped(f"{self.name}: saved step {recorded} of {self.steps}")
        return state


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
