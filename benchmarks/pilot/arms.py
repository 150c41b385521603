"""The training arms of the pilot: alignment and sampled paths.

An arm is named by what it differs in; its data order, new tensors and paths follow from its seed.
One program a kind serves all arms: the peak learning rate and the seed are its arguments.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pilot.material import Material
from benchmarks.pilot.scores import Scores, plain
from benchmarks.pilot.steps import tunable
from jet_jax import data, metrics, sharding
from jet_jax.evaluation.rows import Rows
from jet_jax.optim import OptimConfig
from jet_jax.postnas import supernet, training
from jet_jax.postnas.path_optim import make_path_optimizer
from jet_jax.postnas.training import PathLoss
from jet_jax.step import TrainState

LITERAL = PathLoss(mse=1.0, kl=0.0, normalise=False)  # the paper's figure draws no more
PATH_SEED = 500  # sampled paths have a stream of their own, whatever the arms' seeds


class Arms:
    """Trains arms and scores them.

    Args:
      material: what they are made of.
      retrieval: makes the rows that they are scored on, when the first of them is.
    """

    def __init__(self, material: Material, retrieval: Callable[[], dict[str, Rows]]):
        self.material, self.retrieval = material, retrieval
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._aligned: dict[int, Any] = {}

    @cached_property
    def score(self) -> Scores:
        """Scores trained weights."""
        return Scores(self.material, self.retrieval())

    @property
    def usual(self) -> tuple[str, float, float]:
        """The configured initialisation, and the peaks of alignment and sampled paths."""
        config = self.material.config
        return config.linear.init, config.align.optim.lr, config.supernet.optim.lr

    # ---- programs -----------------------------------------------------------------------------

    def align_step(self, kind: str) -> Callable[..., Any]:
        """The alignment step of a kind, `step(state, batch, peak, seed)`."""
        m = self.material
        net, stage = m.nets[kind], m.config.align

        def make(optimizer, state):
            return training.make_align_step(net, optimizer, state, m.mesh)

        return self._program(("align", kind), lambda: _tunable(make, stage, m.sizes.steps))

    def path_step(self, literal: bool = False) -> Callable[..., Any]:
        """The step on sampled paths, `step(state, batch, peak, seed)`; `literal` as the paper's."""
        m = self.material
        net, stage = m.nets["gla"], m.config.supernet
        loss = LITERAL if literal else stage.loss
        steps = m.sizes.steps * (2 if literal else 1)

        def make(optimizer, state):
            return training.make_path_step(
                net, optimizer, state, m.mesh, law=stage.law, loss=loss, seed=0
            )

        return self._program(("path", literal), lambda: _tunable(make, stage, steps))

    def _program(self, key: Any, make: Callable[[], Any]) -> Callable[..., Any]:
        if key not in self._programs:
            self._programs[key] = make()
        return self._programs[key]

    # ---- training -----------------------------------------------------------------------------

    def state(self, trained: dict[str, Any]) -> TrainState:
        """The state before the first step, of copies of the weights, which steps give away."""
        trained = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trained)
        optimizer = make_path_optimizer(OptimConfig(weight_decay=0.0), 1, trained, {})
        params = {**trained, "teacher": self.material.teacher}
        state = training.init_state(params, optimizer)
        return jax.device_put(state, supernet.shardings(state, self.material.mesh))

    def train(
        self, step: Callable[..., Any], trained: dict[str, Any], batches: list[Any], lr: float,
        seed: int,
    ) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
        """Trains to the end of the batches.

        Returns:
          The trained weights, and what is to be written down: losses, tokens a second after the
          first step, and that step's seconds.

        Raises:
          OutOfTime: the clock says so.
        """
        state, losses = self.state(trained), []
        begun, first = time.perf_counter(), 0.0
        for n, batch in enumerate(batches):
            batch = sharding.put_batch(batch, self.material.mesh)
            state, values = step(state, batch, jnp.float32(lr), jnp.int32(seed))
            losses.append(values["loss"])
            if n % 20 == 0:
                jax.block_until_ready(values)
                first = first or time.perf_counter() - begun
                self.material.clock.check()
        jax.block_until_ready(state.params)
        seconds = time.perf_counter() - begun - first
        size, curve = batches[0]["tokens"].size, np.array([float(x) for x in losses])
        record = {
            "lr": lr,
            "steps": len(curve),
            "tokens": size * len(curve),
            "first_step_s": first,
            "tokens_s": size * (len(curve) - 1) / seconds,
            "loss_first": plain(curve[0]),
            "loss_last_tenth": plain(curve[-max(1, len(curve) // 10) :].mean()),
            "losses": [plain(x) for x in curve[:: max(1, len(curve) // 40)]],
            **metrics.memory_bytes(),
        }
        return state.params, record

    def align(self, kind: str, init: str, lr: float, seed: int) -> dict[str, Any]:
        """One alignment arm: its training, and errors on held-out text before and after."""
        m = self.material
        linear = m.start(kind, init, seed)
        before = self.errors(kind, linear)
        batches = m.remember(
            ("align", seed), lambda: m.batches(*m.sizes.align, m.sizes.steps, seed)
        )
        trained, record = self.train(self.align_step(kind), {"linear": linear}, batches, lr, seed)
        record |= {"errors_before": before, "errors_after": self.errors(kind, trained["linear"])}
        if kind == "gla":
            record["scores"] = self.score(trained["linear"])
            if (init, lr) == self.usual[:2]:
                self._aligned[seed] = trained["linear"]
        return record

    def paths(self, lr: float, seed: int) -> dict[str, Any]:
        """One arm on sampled paths, from the configured alignment of the same seed."""
        m = self.material
        if seed not in self._aligned:  # it was done by an earlier run
            self.align("gla", *self.usual[:2], seed)
        batches = m.remember(
            ("path", seed), lambda: m.batches(*m.sizes.path, m.sizes.steps, PATH_SEED + seed)
        )
        trained = {"linear": self._aligned[seed]}
        trained, record = self.train(self.path_step(), trained, batches, lr, seed)
        return record | {"scores": self.score(trained["linear"])}

    def literal(self, lr: float, seed: int) -> dict[str, Any]:
        """The paper's figure alone: random paths, own stream, squared error, attention trains.

        As many tokens as an alignment and an arm on sampled paths together.
        """
        m = self.material
        batches = m.batches(*m.sizes.path, 2 * m.sizes.steps, PATH_SEED + seed)
        full = m.teacher["layers"]["mixer"]
        trained = {"linear": m.start("gla", "random", seed), "full": full}
        trained, record = self.train(self.path_step(literal=True), trained, batches, lr, seed)
        return record | {"scores": self.score(trained["linear"], trained["full"])}

    def errors(self, kind: str, linear: Any) -> list[float | None]:
        """Each layer's squared error over the teacher's variance on held-out text."""
        m = self.material
        measure = partial(training.align_errors, m.nets[kind], with_grads=False)
        program = self._program(
            ("errors", kind), lambda: jax.jit(lambda params, batch: measure(params, batch)[0])
        )
        rows, length = m.sizes.align
        settings = dataclasses.replace(
            m.config.data, valid=m.valid, batch_size=rows, seq_len=length, num_threads=0
        )
        batches = m.remember("valid", lambda: data.make_valid_batches(settings, max_batches=8))
        params = {"teacher": m.teacher, "linear": linear}
        with jax.set_mesh(m.mesh):
            found = [program(params, sharding.put_batch(batch, m.mesh)) for batch in batches]
        return [plain(x) for x in np.mean([np.asarray(x) for x in found], axis=0)]


def _tunable(make: Any, stage: Any, steps: int) -> Callable[..., Any]:
    """A stage's step for arms of so many steps, with the stage's share of warm-up."""
    warmup = round(steps * stage.optim.warmup_steps / stage.steps)
    return tunable(make, dataclasses.replace(stage.optim, lr=1.0, warmup_steps=warmup), steps)
