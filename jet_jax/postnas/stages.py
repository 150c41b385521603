"""The stages of a search, each from what the stages before it left in the workdir.

    align       linear paths learn their layer's attention, teacher-forced
    supernet    sampled paths on their own stream
    placement   which layers keep their attention
    hybrid      the model of that placement, for train.py and every command
    report      report.html

A stage that is done has left STAGE.json; it is not run again.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jet_jax import checkpoint, data, io, metrics, sharding
from jet_jax.config import ModelConfig
from jet_jax.evaluation.tasks import Settings, find, read_documents
from jet_jax.params import flatten, split
from jet_jax.postnas import figures, report, supernet, training
from jet_jax.postnas.inherit import matched_options
from jet_jax.postnas.initialise import linear_weights
from jet_jax.postnas.objectives import Objective, check_objectives
from jet_jax.postnas.path_optim import make_path_optimizer
from jet_jax.postnas.path_scores import PathScorer
from jet_jax.postnas.placement import Placement
from jet_jax.postnas.search_config import ObjectiveConfig, SearchConfig
from jet_jax.postnas.stage_training import Loop, StageCheckpoints
from jet_jax.postnas.supernet import Supernet
from jet_jax.progress import Display

STAGES = ("align", "supernet", "placement", "hybrid", "report")
# Settings that say how a search is computed, not what it is.
HOW = (
    r"(mesh|distributed)\.|(log_every|checkpoint_every|compile_cache)$|data\.(num_threads|prefetch)$"
    r"|placement\.(batch_size|chunk)$|supernet\.accumulation$"
)


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

    # ---- what is known before anything is computed ----------------------------------------------

    @cached_property
    def teacher(self) -> ModelConfig:
        """The teacher's config, in the compute dtype of the search."""
        config = io.load_config(self.config.teacher)
        return config.replace(dtype=self.config.dtype or config.dtype)

    @cached_property
    def net(self) -> Supernet:
        """The supernet's structure."""
        supernet.check_teacher(self.teacher)
        linear, window = self.config.linear, self.config.placement.window
        attention = dict(self.teacher.mixers).get("attn") or self.teacher.options("swa")
        options = dict(linear.options)
        made: Any = options or matched_options(linear.kind, attention, self.teacher.hidden_size)
        return Supernet.of(self.teacher, linear.kind, made, window)

    @cached_property
    def objectives(self) -> list[Objective]:
        """The objectives with their rows, of the split "search"."""
        tokenizer = data.load_tokenizer(self.config.data.tokenizer, self.teacher.vocab_size)
        out = []
        for name, wanted in self.config.placement.objectives.items():
            task = find([wanted.task])[wanted.task]
            rows = task.rows(tokenizer, _settings(wanted, "search"))
            out.append(Objective(name, rows, wanted.figure, wanted.gate))
        check_objectives(out)
        return out

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
        path, mine = self.workdir / "search.json", _plain(self.config.to_dict())
        if path.exists():
            there = flatten(json.loads(path.read_text(encoding="utf-8")))
            changed = [
                f"  {name}: {there[name]!r} there, {value!r} here"
                for name, value in flatten(mine).items()
                if name in there and there[name] != value and not re.match(HOW, name)
            ]
            if changed:
                lines = "\n".join(changed)
                raise ValueError(
                    f"{self.workdir} holds another search:\n{lines}\nGive another --workdir."
                )
        placement = Placement(self.config.placement, self._scorer({}))
        placement.check()
        self.workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, mine)

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
        with closing(self._data(2)) as iterator, jax.set_mesh(self.mesh):
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
            require_stage(self.workdir, stage)
            if stage == "supernet" and self.config.supernet.train_full:
                shapes["full"] = _float32_shapes(self.teacher_weights["layers"]["mixer"])
            with closing(StageCheckpoints(self.workdir / stage)) as checkpoints:
                return checkpoints.trained(shapes, self.mesh)
        return {"linear": self.start_weights()}

    def _data(self, stage: int) -> data.TrainIterator:
        config = self.config.data
        return data.make_train_iterator(
            dataclasses.replace(config, seed=(config.seed + stage) % 2**32),
            vocab_size=self.teacher.vocab_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    # ---- stages -------------------------------------------------------------------------------

    def align(self) -> dict[str, Any]:
        """Teacher-forced alignment of every layer's linear path."""
        settings = self.config.align
        if not settings.steps:
            return {"steps": 0}
        trained = {"linear": self.start_weights()}
        optimizer = make_path_optimizer(settings.optim, settings.steps, trained, {})
        state = self._state(trained, optimizer)
        step = training.make_align_step(self.net, optimizer, state, self.mesh)
        return self._train("align", 0, settings.steps, state, step)

    def supernet(self) -> dict[str, Any]:
        """Training on sampled paths."""
        settings = self.config.supernet
        if not settings.steps:
            return {"steps": 0}
        trained = self.trained("align")
        if settings.train_full:
            attention = self.teacher_weights["layers"]["mixer"]
            trained["full"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32), attention)
        optimizer = make_path_optimizer(
            settings.optim, settings.steps, trained, {"full": settings.full_lr}
        )
        state = self._state(trained, optimizer)
        step = training.make_path_step(
            self.net, optimizer, state, self.mesh, law=settings.law, loss=settings.loss,
            seed=self.config.seed, accumulation=settings.accumulation,
        )  # fmt: skip
        return self._train("supernet", 1, settings.steps, state, step)

    def _state(self, trained: dict[str, Any], optimizer: Any) -> Any:
        params = {**trained, "teacher": self.teacher_weights}
        state = training.init_state(params, optimizer)
        return jax.device_put(state, supernet.shardings(state, self.mesh))

    def _train(self, name: str, number: int, steps: int, state: Any, step: Any) -> dict[str, Any]:
        c = self.config
        forward = self.teacher.flops_per_token(c.data.seq_len)
        loop = Loop(
            name, self.workdir / name, steps, self.mesh, c.data.batch_size * c.data.seq_len,
            # The teacher and, on sampled paths, the student with its gradients.
            forward * (2 if name == "align" else 4), c.log_every, c.checkpoint_every,
        )  # fmt: skip
        with closing(self._data(number)) as iterator:
            loop.run(state, step, iterator)
        records = metrics.read_records(self.workdir / name, "train")
        names = ("loss", "mse", "kl", "tokens_per_second")
        ends = {
            end: {k: r[k] for k in names if k in r}
            for end, r in (("first", records[0]), ("last", records[-1]))
        }
        return {"steps": steps, "tokens": steps * loop.batch_tokens, **ends}

    def _scorer(self, params: Mapping[str, Any]) -> PathScorer:
        c = self.config.placement
        return PathScorer(
            self.net, params, self.objectives, self.mesh, batch_size=c.batch_size, chunk=c.chunk
        )

    def placement(self) -> dict[str, Any]:
        """Scores placements through the supernet and decides."""
        folder = self.workdir / "placement"
        folder.mkdir(exist_ok=True)
        params = {**self.trained("supernet", "align"), "teacher": self.teacher_weights}
        scorer = self._scorer(params)
        known = folder / "scores.json"
        if known.exists():
            scorer.load(known)
        display = Display(0, live=False)
        columns = (
            TextColumn("scoring"), BarColumn(20), MofNCompleteColumn(), TextColumn("paths, left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=display.console, transient=True) as progress:
            task = progress.add_task("", total=None)

            def advance(count: int) -> None:
                progress.advance(task, count)
                scorer.save(known)

            scorer.advance = advance
            placement = Placement(self.config.placement, scorer)
            decision = placement.run()
        table = placement.table()
        write_json(folder / "table.json", table)
        head = ["kept layers", "path", *decision["objectives"]]
        rows = [
            [_kept(r["path"]), "".join(map(str, r["path"])), *list(r.values())[1:]] for r in table
        ]
        (folder / "table.md").write_text(report.markdown(head, rows), encoding="utf-8")
        better = {o.name: o.more_is_better for o in scorer.objectives}
        kept = [i for i, kind in enumerate(decision["layer_types"]) if kind == "attn"]
        figures.heat_map(decision["heat_map"], better, kept, folder / "heat_map.png")
        if decision["curve"]:
            judge = scorer.objective(self.config.placement.full_by)
            figures.curve(decision["curve"], f"{judge.name}: {judge.figure}", folder / "curve.png")
        return decision

    def hybrid(self) -> dict[str, Any]:
        """Saves the chosen hybrid as a model directory."""
        decision = read_stage(self.workdir, "placement")
        params = {**self.trained("supernet", "align"), "teacher": self.teacher_weights}
        config = self.net.hybrid(decision["path"])
        weights = self.net.extract(params, decision["path"])
        target = self.workdir / "model"
        tokenizer = io.tokenizer_dir(self.config.teacher)
        checkpoint.save_model(target, config, weights, tokenizer, overwrite=target.exists())
        full = self.teacher
        context = full.max_position_embeddings
        return {
            "model": str(target),
            "layer_types": list(config.layer_types),
            "parameters": config.param_count(),
            "teacher_parameters": full.param_count(),
            "context": context,
            "cache_bytes": config.cache_bytes(context),
            "teacher_cache_bytes": full.cache_bytes(context),
        }

    def report(self) -> dict[str, Any]:
        """Writes report.html from what the other stages left."""
        from jet_jax.postnas.search_report import write_report

        return {"report": str(write_report(self.workdir, self.config))}

    def run(self, stage: str) -> dict[str, Any]:
        """Runs a stage and notes that it is done; what later stages made of it is not any more."""
        for later in STAGES[STAGES.index(stage) :]:
            (self.workdir / f"{later}.json").unlink(missing_ok=True)
        if stage in ("align", "supernet"):  # whose weights the known scores are of
            (self.workdir / "placement" / "scores.json").unlink(missing_ok=True)
        result = getattr(self, stage)()
        if jax.process_index() == 0:
            write_json(self.workdir / f"{stage}.json", result)
        return result

    def is_done(self, stage: str) -> bool:
        """Whether a stage has left its result."""
        return (self.workdir / f"{stage}.json").is_file()


def read_stage(workdir: Path, stage: str) -> dict[str, Any]:
    """A stage's result. Raises ValueError if it is not done."""
    require_stage(workdir, stage)
    return json.loads((workdir / f"{stage}.json").read_text(encoding="utf-8"))


def require_stage(workdir: Path, stage: str) -> None:
    """Raises ValueError if a stage is not done."""
    if not (workdir / f"{stage}.json").is_file():
        raise ValueError(
            f"{workdir} has no result of the stage {stage!r} yet; run it with --stage={stage}, or "
            "all stages without --stage"
        )


def write_json(path: Path, value: Any) -> None:
    """Replaces a JSON file as a whole."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def _settings(wanted: ObjectiveConfig, split_name: str) -> Settings:
    documents = read_documents(wanted.documents) if wanted.documents else ()
    return Settings(
        length=wanted.length, items=wanted.num_items, seed=wanted.seed, split=split_name,
        documents=documents,
    )  # fmt: skip


def _float32_shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value))


def _kept(path: list[int]) -> str:
    return ", ".join(f"{i}" + "w" * (x == 2) for i, x in enumerate(path) if x != 1) or "none"
