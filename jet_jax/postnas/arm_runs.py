"""The training runs of one arm of a comparison, each kept on disk when it is finished.

    ARM/align-SEED/              the teacher-forced alignment and its weights
    ARM/tune-RATE.json           what a short run at a learning rate reached
    ARM/seed-SEED-RATE.json      what a run that counts reached
    ARM/tune-RATE/, seed-SEED-RATE/      their metrics; checkpoints until they are finished

A run that was killed goes on from its newest checkpoint, one that is finished is not run again.
All runs of an arm share two compiled steps: learning rates are data.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jet_jax import data, io, metrics, optim, sharding
from jet_jax.config import ModelConfig
from jet_jax.distill import DistillConfig, distill_loss, flops_per_token
from jet_jax.optim import OptimConfig
from jet_jax.option_checks import require
from jet_jax.params import flatten, unflatten
from jet_jax.postnas.arms import hybrid_config
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.hybrid_start import new_mixers
from jet_jax.postnas.json_files import read_json, write_json
from jet_jax.postnas.objectives import Objective
from jet_jax.postnas.paths import LINEAR
from jet_jax.postnas.rates import learning_rates, make_rate_optimizer
from jet_jax.postnas.refit import output_name
from jet_jax.postnas.stage_training import Loop, StageCheckpoints
from jet_jax.step import TrainState, abstract_model, cast_params, make_loss_step

ALIGN, TUNE, RUN, REFIT = range(4)  # each sort of run reads the data in an order of its own


@dataclass(eq=False)
class ArmRuns:
    """One arm.

    Attributes:
      name: of the arm.
      settings: of the comparison.
      context: what all arms share.
      folder: what it writes to.
    """

    name: str
    settings: ComparisonConfig
    context: ComparisonContext
    folder: Path

    def __post_init__(self) -> None:
        self._steps: dict[bool, Any] = {}

    # ---- what is known before anything is computed ----------------------------------------------

    @cached_property
    def config(self) -> ModelConfig:
        """The hybrid."""
        c = self.context
        arm = self.settings.arms[self.name]
        return hybrid_config(c.teacher.config, c.path, self.name, arm, c.window)

    @cached_property
    def new_layers(self) -> tuple[int, ...]:
        """The layers that are not the teacher's."""
        return tuple(i for i, choice in enumerate(self.context.path) if choice == LINEAR)

    @cached_property
    def _structure(self) -> tuple[Any, dict]:
        return abstract_model(self.config, self.settings.remat)

    def check(self) -> None:
        """Raises ValueError, naming the arm, for what does not fit; computes nothing."""
        config, settings = self.config, self.settings
        try:
            mixers = jax.eval_shape(
                lambda params: new_mixers(
                    config, dataclasses.replace(self.context.teacher, params=params),
                    self.new_layers, settings.init.removesuffix("_refit"), jax.random.key(0),
                ),
                self.context.teacher.params,
            )  # fmt: skip
            if settings.init == "copy_refit":
                output_name(next(iter(mixers.values())))
        except ValueError as error:
            raise ValueError(
                f"arm {self.name!r} cannot start with init={settings.init!r}: {error}. "
                "init='random' serves all arms"
            ) from error
        try:
            for patterns in (settings.trains, self._aligned):
                trainable, _ = _parted(self._structure[1], patterns)
                optim.lr_multipliers(trainable, settings.optim)
        except ValueError as error:
            raise ValueError(f"arm {self.name!r}: {error}") from error

    @property
    def _aligned(self) -> tuple[str, ...]:
        """What the alignment trains."""
        return (rf"^layers\.({'|'.join(map(str, self.new_layers))})\.mixer\.",)

    # ---- weights ------------------------------------------------------------------------------

    def _with(self, mixers: Mapping[int, Any]) -> dict[str, Any]:
        """The hybrid's weights, everything but the new mixers being the teacher's arrays."""
        params = dict(self.context.teacher.params)
        layers = {
            i: {**layer, "mixer": mixers[i]} if i in mixers else layer
            for i, layer in params["layers"].items()
        }
        params |= {"layers": layers}
        return jax.device_put(params, sharding.shardings(params, self.context.mesh))

    def start(self, seed: int) -> dict[str, Any]:
        """The hybrid's weights before any training."""
        settings, mesh = self.settings, self.context.mesh
        make = partial(
            new_mixers, self.config, self.context.teacher, self.new_layers, settings.init,
            jax.random.key(seed),
        )  # fmt: skip
        if settings.init != "copy_refit":
            return self._with(make())
        with closing(self._data(seed, REFIT)) as batches, jax.set_mesh(mesh):
            some = islice(batches, settings.refit_batches)
            mixers = make(sharding.put_batch(batch, mesh) for batch in some)
        return self._with(mixers)

    def _data(self, seed: int, sort: int) -> data.TrainIterator:
        config = self.context.data
        # From 10 on, as the stages of a search take the numbers before.
        own = (config.seed + 10 * (seed + 1) + sort) % 2**32
        return data.make_train_iterator(
            dataclasses.replace(config, seed=own),
            vocab_size=self.config.vocab_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    # ---- runs ---------------------------------------------------------------------------------

    def aligned(self, seed: int) -> dict[str, Any]:
        """The hybrid's weights after its alignment, which is run unless it is done."""
        steps = self.settings.align_steps
        if not steps:
            return self.start(seed)
        folder = self.folder / f"align-{seed}"
        mesh = self.context.mesh
        with closing(StageCheckpoints(folder, shardings=sharding.shardings)) as checkpoints:
            if checkpoints.latest == steps:
                shapes = {i: self._structure[1]["layers"][i]["mixer"] for i in self.new_layers}
                shapes = {"layers": {i: {"mixer": shape} for i, shape in shapes.items()}}
                trained = checkpoints.trained(shapes, mesh)["layers"]
                return self._with({i: trained[i]["mixer"] for i in self.new_layers})
        return self._train(folder, self.start(seed), self.settings.align_optim, steps, seed, ALIGN)

    def tune(self, rate: float) -> dict[str, Any]:
        """What a short run at a learning rate reaches, from the first seed's alignment.

        Returns:
          `value`, the figure to choose by, None if training diverged, and `note`.
        """
        seed, tuning = self.settings.seeds[0], self.context.tuning
        return self._piece(
            tuning_name(rate), seed, rate, self.settings.tuning_steps, TUNE,
            lambda params: {"value": self._figures(params, [tuning])[tuning.name]},
        )  # fmt: skip

    def judge(self, seed: int, rate: float, objectives: Sequence[Objective]) -> dict[str, Any]:
        """What a run that counts reaches.

        Returns:
          `figures` by objective, None if training diverged, `note`, and of the training `loss`,
          `mse` and `kl` at the end and `tokens_per_second`.
        """
        return self._piece(
            seed_name(seed, rate), seed, rate, self.settings.steps, RUN,
            lambda params: {"figures": self._figures(params, objectives)},
        )  # fmt: skip

    def _figures(self, params: Any, objectives: Sequence[Objective]) -> dict[str, float]:
        cast = cast_params(params, jnp.dtype(self.config.dtype))
        return self.context.figures(nnx.merge(self._structure[0], cast), objectives)

    def is_done(self, name: str) -> bool:
        """Whether the run of that name has left its result."""
        return (self.folder / f"{name}.json").is_file()

    def _piece(self, name, seed, rate, steps, sort, judge) -> dict[str, Any]:
        """Trains and judges, unless the result is there."""
        path, folder = self.folder / f"{name}.json", self.folder / name
        if (found := read_json(path)) is not None:
            return found
        result: dict[str, Any] = {"value": None, "figures": None, "note": None}
        optim = dataclasses.replace(self.settings.optim, lr=rate)
        try:
            params = self._train(folder, self.aligned(seed), optim, steps, seed, sort)
            result |= judge(params)
        except FloatingPointError as error:
            result["note"] = f"diverged: {error}"
        records = metrics.read_records(folder, "train")
        if records:
            last = {k: records[-1].get(k) for k in ("step", "loss", "mse", "kl")}
            result |= last | {"tokens_per_second": steady_rate(records)}
        write_json(path, result)
        if not self.settings.keep_weights:
            shutil.rmtree(folder / io.CHECKPOINTS, ignore_errors=True)
        return result

    def tidy(self) -> None:
        """Deletes the alignments' weights, when no run needs them any more."""
        if not self.settings.keep_weights:
            for folder in self.folder.glob("align-*"):
                shutil.rmtree(folder / io.CHECKPOINTS, ignore_errors=True)

    def _train(
        self,
        folder: Path,
        params: dict[str, Any],
        config: OptimConfig,
        steps: int,
        seed: int,
        sort: int,
    ) -> dict[str, Any]:
        """Runs a loop to its end and gives back all weights."""
        c, forced = self.context, sort == ALIGN
        trainable, frozen = _parted(params, self._aligned if forced else self.settings.trains)
        # Copies: the step takes over what trains, and the teacher's arrays are to stay.
        trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
        room = steps if forced else max(self.settings.lengths.values())
        optimizer = make_rate_optimizer(config, trainable, learning_rates(config, steps, room))
        state = TrainState(jnp.zeros((), jnp.int32), trainable, {}, optimizer.init(trainable))
        state = jax.device_put(state, sharding.shardings(state, c.mesh))
        if forced not in self._steps:
            self._steps[forced] = self._make_step(forced, optimizer, state, frozen)
        step = self._steps[forced]

        def one(state, batch):
            state, values = step(state, batch, frozen, c.teacher.params)
            return state, values | {"lr": state.opt_state[1].used}

        context = c.data.seq_len
        flops = flops_per_token(self._loss(forced), self.config, c.teacher.config, context)
        loop = Loop(
            f"{self.name}, {folder.name}", folder, steps, c.mesh, c.data.batch_size * context,
            flops, c.log_every, c.checkpoint_every, sharding.shardings,
        )  # fmt: skip
        with closing(self._data(seed, sort)) as iterator:
            state = loop.run(state, one, iterator)
        return optim.combine(state.params, frozen)

    def _loss(self, forced: bool) -> DistillConfig:
        loss = self.settings.loss
        if forced:
            return DistillConfig("teacher", kl=0.0, forced=True)
        return DistillConfig("teacher", mse=loss.mse, kl=loss.kl, normalise=loss.normalise)

    def _make_step(self, forced: bool, optimizer: Any, state: TrainState, frozen: Any) -> Any:
        structure, teacher = self._structure[0], self.context.teacher
        config, dtype = self._loss(forced), jnp.dtype(self.config.dtype)

        def loss(params, batch, frozen, guide):
            student = nnx.merge(structure, cast_params(optim.combine(params, frozen), dtype))
            reader = nnx.merge(teacher.graphdef, guide)
            # Windowed layers differ from the teacher's too, but the alignment leaves them as is.
            return distill_loss(config, student, reader, batch, forced_layers=self.new_layers)

        return make_loss_step(
            loss, optimizer, lambda step: 0.0, state, self.context.mesh,
            accumulation=self.settings.accumulation, others=(frozen, teacher.params),
        )  # fmt: skip


def tuning_name(rate: float) -> str:
    """The name of the run that tries a learning rate."""
    return f"tune-{rate:g}"


def seed_name(seed: int, rate: float) -> str:
    """The name of a seed's run that counts."""
    return f"seed-{seed}-{rate:g}"


def steady_rate(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens a second: the median over records after the first, whose step was compiled."""
    rates = [record["tokens_per_second"] for record in records[1:]]
    return statistics.median(rates) if rates else None


def _parted(params: Mapping[str, Any], patterns: Sequence[str]) -> tuple[dict, dict]:
    """What trains and what does not, as nested dicts. Raises ValueError for an idle pattern."""
    flat = flatten(params)
    for pattern in patterns:
        require(
            any(re.search(pattern, path) for path in flat),
            f"trains: {pattern!r} matches no weight; paths look like {next(iter(flat))}",
        )
    trains = {path for path in flat if any(re.search(p, path) for p in patterns)}
    return (
        unflatten({path: x for path, x in flat.items() if path in trains}),
        unflatten({path: x for path, x in flat.items() if path not in trains}),
    )
