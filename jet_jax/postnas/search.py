"""A search in one workdir: what it was told, what follows from that, and its weights so far."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jet_jax import data, io, sharding
from jet_jax.config import ModelConfig
from jet_jax.distill import Teacher
from jet_jax.evaluation.rows import Rows
from jet_jax.evaluation.tasks import Settings, find, read_documents
from jet_jax.option_checks import require
from jet_jax.params import split
from jet_jax.postnas import supernet
from jet_jax.postnas.arms import hybrid_config
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.early_checks import check_comparison, check_training
from jet_jax.postnas.inherit import matched_options
from jet_jax.postnas.initialise import linear_weights
from jet_jax.postnas.json_files import plain, read_json, write_json
from jet_jax.postnas.objectives import Objective, check_objectives
from jet_jax.postnas.path_scores import PathScorer
from jet_jax.postnas.placement import Placement
from jet_jax.postnas.placement_config import ObjectiveConfig
from jet_jax.postnas.search_changes import forget, refuse_changes, to_keep
from jet_jax.postnas.search_config import (
    COMPARED,
    TRAINED,
    SearchConfig,
    final_comparison,
)
from jet_jax.postnas.stage_training import StageCheckpoints
from jet_jax.postnas.stand_in import stand_in
from jet_jax.postnas.supernet import Supernet
from jet_jax.train_config import TrainConfig


@dataclass
class Search:
    """A search in one workdir.

    Attributes:
      config: what to do.
      workdir: where to write.
      mesh: device mesh.
    """

    config: SearchConfig
    workdir: Path
    mesh: Mesh
    _rows: dict[tuple[str, str], Rows] = field(default_factory=dict, init=False, repr=False)

    # ---- what is known before anything is computed ----------------------------------------------

    @cached_property
    def teacher(self) -> ModelConfig:
        """The teacher's config, in the compute dtype of the search."""
        config = io.load_config(self.config.teacher)
        return config.replace(dtype=self.config.dtype or config.dtype)

    @cached_property
    def net(self) -> Supernet:
        """The supernet's structure."""
        return self._net_of(self.teacher)

    def _net_of(self, teacher: ModelConfig) -> Supernet:
        supernet.check_teacher(teacher)
        linear, window = self.config.linear, self.config.placement.window
        attention = dict(teacher.mixers).get("attn") or teacher.options("swa")
        options = dict(linear.options)
        made: Any = options or matched_options(linear.kind, attention, teacher.hidden_size)
        return Supernet.of(teacher, linear.kind, made, window)

    @property
    def window(self) -> int | None:
        """Tokens that windowed layers see, None where there can be none."""
        return self.net.config.options("swa").window_size if self.net.has_window else None

    @cached_property
    def objectives(self) -> list[Objective]:
        """The objectives with their rows, of the split "search"."""
        out = [self.objective(name, "search") for name in self.config.placement.objectives]
        check_objectives(out)
        return out

    def objective(self, name: str, split_name: str) -> Objective:
        """An objective with its rows, of a split."""
        wanted = self.config.placement.objectives[name]
        if (name, split_name) not in self._rows:
            task = find([wanted.task])[wanted.task]
            try:
                rows = task.rows(self._tokenizer, _settings(wanted, split_name))
            except ValueError as error:
                raise ValueError(f"objective {name}, split {split_name!r}: {error}") from error
            self._rows[name, split_name] = rows
        return Objective(name, self._rows[name, split_name], wanted.figure, wanted.gate)

    @cached_property
    def _tokenizer(self) -> data.TextTokenizer:
        return data.load_tokenizer(self.config.data.tokenizer, self.teacher.vocab_size)

    def check(self) -> None:
        """Finds what is wrong with the settings before any compute is spent.

        Raises:
          ValueError: naming what does not fit, or a workdir of another search.
          OSError: a file cannot be read.
        """
        sharding.check_batch(
            self.config.data.batch_size, self.mesh, self.config.supernet.accumulation
        )
        sharding.check_batch(self.config.placement.batch_size, self.mesh)
        if jax.process_count() > 1:
            raise ValueError("a search runs in one process so far; give it one host's devices")
        path, mine = self.workdir / "search.json", plain(self.config.to_dict())
        there = read_json(path)
        if there is not None:
            refuse_changes(there, mine, self.workdir)
            mine = to_keep(there, mine)
        Placement(self.config.placement, self.scorer({})).check()
        if mine != there:  # it was seen to fit before
            self._check_later_stages()
        self.workdir.mkdir(parents=True, exist_ok=True)
        if there is not None:
            forget(there, mine, self.workdir, self.config)
        write_json(path, mine)

    def _check_later_stages(self) -> None:
        """What comparisons and final training ask for, in a placement that stands in for theirs."""
        c, place = self.config, self.config.placement
        compared = {x: getattr(c, x) for x in COMPARED if getattr(c, x) is not None}
        if c.final and c.final not in COMPARED:
            compared["final"] = final_comparison(c)
        require(
            not compared or place.full + place.windows < self.net.num_layers,
            "the placement keeps every layer, which leaves nothing to compare or to convert",
        )
        teacher, path = stand_in(self.teacher, place.full, place.windows)
        for name, settings in compared.items():
            check_comparison(name, settings, self._context(settings, teacher, path))
        for name in place.objectives:
            self.objective(name, "test")  # what the evaluation at the end asks
        if c.final:
            last = compared[c.final if c.final in COMPARED else "final"]
            first_arm = next(iter(last.arms.items()))
            student = hybrid_config(teacher.config, path, *first_arm, self.window)
        else:
            student = self._net_of(teacher.config).hybrid(path)
        for name in TRAINED:
            if getattr(c, name) is not None:
                run = TrainConfig.from_dict(c.training(name, c.teacher))
                check_training(name, run, student, self.mesh)

    # ---- weights ------------------------------------------------------------------------------

    @cached_property
    def teacher_weights(self) -> dict[str, Any]:
        """The teacher's weights in the compute dtype, layers stacked."""
        model = io.load(self.config.teacher, dtype=self.teacher.dtype, mesh=self.mesh)
        stack = supernet.stack(split(model)[1])
        return jax.device_put(stack, supernet.shardings(stack, self.mesh))

    def start_weights(self) -> dict[str, Any]:
        """The linear paths before any training."""
        linear = self.config.linear
        batches: Iterable[Any] = ()
        with closing(self.batches(2)) as iterator, jax.set_mesh(self.mesh):
            if linear.init == "copy_refit":
                batches = (
                    sharding.put_batch(b, self.mesh) for b in islice(iterator, linear.refit_batches)
                )
            key = jax.random.key(self.config.seed)
            weights = linear_weights(self.net, self.teacher_weights, linear.init, key, batches)
        return jax.device_put(weights, supernet.shardings({"linear": weights}, self.mesh)["linear"])

    def trained(self, *stages: str) -> dict[str, Any]:
        """What the last of the stages that has run has trained; the start where none has any steps.

        Raises:
          ValueError: a stage that has steps is not done yet.
        """
        shapes = {"linear": jax.eval_shape(self.net.random_linear, jax.random.key(0))}
        for stage in stages:
            if getattr(self.config, stage).steps == 0:
                continue
            self.require(stage)
            if stage == "supernet" and self.config.supernet.train_full:
                shapes["full"] = _float32_shapes(self.teacher_weights["layers"]["mixer"])
            with closing(StageCheckpoints(self.workdir / stage)) as checkpoints:
                return checkpoints.trained(shapes, self.mesh)
        return {"linear": self.start_weights()}

    def batches(self, stage: int) -> data.TrainIterator:
        """The training data in an order of its own for each stage; the caller closes it."""
        config = self.config.data
        return data.make_train_iterator(
            dataclasses.replace(config, seed=(config.seed + stage) % 2**32),
            vocab_size=self.teacher.vocab_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def params(self) -> dict[str, Any]:
        """The supernet's weights as its last stage left them."""
        return {**self.trained("supernet", "align"), "teacher": self.teacher_weights}

    def scorer(self, params: Mapping[str, Any]) -> PathScorer:
        """Scores paths through a supernet of these weights."""
        c = self.config.placement
        return PathScorer(
            self.net, params, self.objectives, self.mesh, batch_size=c.batch_size, chunk=c.chunk
        )

    def judge(self, settings: ComparisonConfig) -> str:
        """The objective that decides a comparison and its learning rates."""
        return (*settings.judged_by, self.config.placement.full_by)[0]

    def comparison(self, settings: ComparisonConfig) -> ComparisonContext:
        """What the arms of a comparison share, in the placement that was chosen.

        Raises:
          ValueError: there is no placement yet.
        """
        model = io.load(self.config.teacher, dtype=self.teacher.dtype, mesh=self.mesh)
        return self._context(settings, Teacher.of(model), self.result("placement")["path"])

    def _context(
        self, settings: ComparisonConfig, teacher: Teacher, path: Sequence[int]
    ) -> ComparisonContext:
        c = self.config
        # With one learning rate there is nothing to tune.
        split_name = "tuning" if len(settings.learning_rates) > 1 else "search"
        return ComparisonContext(
            teacher=teacher,
            path=path,
            data=c.data,
            mesh=self.mesh,
            objectives=self.objectives,
            tuning=self.objective(self.judge(settings), split_name),
            window=self.window,
            batch_size=c.placement.batch_size,
            log_every=c.log_every,
            checkpoint_every=c.checkpoint_every,
            measurements=self.workdir / "measurements",
        )

    # ---- results ------------------------------------------------------------------------------

    def is_done(self, stage: str) -> bool:
        """Whether a stage has left its result."""
        return (self.workdir / f"{stage}.json").is_file()

    def require(self, stage: str) -> None:
        """Raises ValueError if a stage is not done."""
        if not self.is_done(stage):
            raise ValueError(
                f"{self.workdir} has no result of the stage {stage!r} yet; run it with "
                f"--stage={stage}, or all stages without --stage"
            )

    def model(self, stage: str) -> str:
        """The directory of the model that "hybrid", "distill" or "finetune" has left.

        Raises:
          ValueError: the stage is not done.
        """
        self.require(stage)
        return str(self.workdir / ("model" if stage == "hybrid" else stage))

    def result(self, stage: str) -> dict[str, Any]:
        """A stage's result. Raises ValueError if it is not done."""
        self.require(stage)
        return json.loads((self.workdir / f"{stage}.json").read_text(encoding="utf-8"))


def _settings(wanted: ObjectiveConfig, split_name: str) -> Settings:
    documents = read_documents(wanted.documents) if wanted.documents else ()
    return Settings(
        length=wanted.length, items=wanted.num_items, seed=wanted.seed, split=split_name,
        documents=documents,
    )  # fmt: skip


def _float32_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)
