"""The settings of a search: one frozen dataclass, made once from a config file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jet_jax.config import DTYPES
from jet_jax.data.config import DataConfig
from jet_jax.io import tokenizer_dir
from jet_jax.mixer_options import build
from jet_jax.mixers import MIXERS
from jet_jax.optim import OptimConfig, make_schedule
from jet_jax.postnas.comparison_config import ArmConfig, ComparisonConfig, MeasureConfig
from jet_jax.postnas.inherit import INITS
from jet_jax.postnas.paths import PathLaw
from jet_jax.postnas.placement_config import PlacementConfig
from jet_jax.postnas.supernet import REMATS
from jet_jax.postnas.training import PathLoss
from jet_jax.train_config import DistributedConfig, MeshConfig, TrainConfig

COMPARED, TRAINED = ("blocks", "ablations", "shapes"), ("distill", "finetune")
STAGES = (
    "align", "supernet", "placement", *COMPARED, "hybrid", *TRAINED, "evaluate", "report",
)  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    """The linear path of the supernet.

    Attributes:
      kind: layer type.
      options: its options; empty takes those that match the attention's heads.
      init: `random`, `copy` or `copy_refit`. On SmolLM2-135M the copy was ahead
        of both after two million tokens of alignment (one seed and rate, benchmarks/RESULTS.md).
      refit_batches: batches that `copy_refit` fits on.
    """

    kind: str = "gla"
    options: Mapping[str, Any] = field(default_factory=dict)
    init: str = "copy"
    refit_batches: int = 4

    def __post_init__(self) -> None:
        if self.init not in INITS:
            raise ValueError(f"linear.init={self.init!r} is unknown; use {', '.join(INITS)}")


@dataclass(frozen=True)
class StageConfig:
    """The alignment.

    Attributes:
      steps: optimizer updates; 0 leaves the stage out.
      optim: optimizer and schedule.
      accumulation: parts that a batch is worked off in, to save memory.
    """

    steps: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    accumulation: int = 1


@dataclass(frozen=True)
class SupernetConfig:
    """Training on sampled paths.

    Attributes:
      steps: optimizer updates; 0 leaves the stage out.
      optim: optimizer and schedule.
      law: how paths are drawn.
      loss: what they are trained on.
      train_full: whether the attention of active full layers trains too, as the paper draws it.
      full_lr: its learning-rate factor.
      accumulation: parts that a batch is worked off in.
      remat: what is computed again for the gradients: `mixer`, or the whole `layer` to save memory.
    """

    steps: int = 0
    optim: OptimConfig = field(default_factory=OptimConfig)
    law: PathLaw = field(default_factory=PathLaw)
    loss: PathLoss = field(default_factory=PathLoss)
    train_full: bool = False
    full_lr: float = 0.1
    accumulation: int = 1
    remat: str = "mixer"

    def __post_init__(self) -> None:
        if self.remat not in REMATS:
            raise ValueError(f"supernet.remat={self.remat!r} is unknown; use {', '.join(REMATS)}")


@dataclass(frozen=True)
class SearchConfig:
    """Everything that `search.py` does, beyond where it writes.

    Attributes:
      teacher: directory of the model to convert.
      data: text that the stages train on.
      linear: the linear path.
      align: the teacher-forced stage.
      supernet: the sampled paths.
      placement: where attention stays.
      blocks: a comparison of layers in the chosen placement; None for none.
      ablations: another, of one block's variants.
      shapes: another, of one block's shapes at one cache size; the fastest good one is chosen.
      final: what the hybrid has where it keeps no attention: empty for the supernet's linear path
        as trained, "blocks" or "shapes" for what that comparison chose, aligned as it was there, or
        a layer type, which is aligned as `align` says.
      final_options: of that layer type, changes to those that match the attention's heads.
      measure: sizes at which the teacher and the hybrid are timed at the end; None times neither.
      distill: settings of `train.py` for the first run of final training; None for none.
      finetune: the same for the second.
      mesh: device mesh.
      distributed: processes.
      seed: of new weights and of the paths.
      dtype: compute dtype; None takes the teacher's own.
      log_every: steps between records.
      checkpoint_every: steps between checkpoints; 0 for none but the last.
      compile_cache: folder of compiled programs; empty for none.
    """

    teacher: str
    data: DataConfig
    placement: PlacementConfig
    linear: LinearConfig = field(default_factory=LinearConfig)
    align: StageConfig = field(default_factory=StageConfig)
    supernet: SupernetConfig = field(default_factory=SupernetConfig)
    blocks: ComparisonConfig | None = None
    ablations: ComparisonConfig | None = None
    shapes: ComparisonConfig | None = None
    final: str = ""
    final_options: Mapping[str, Any] = field(default_factory=dict)
    measure: MeasureConfig | None = None
    distill: Mapping[str, Any] | None = None
    finetune: Mapping[str, Any] | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int = 0
    dtype: str | None = None
    log_every: int = 10
    checkpoint_every: int = 0
    compile_cache: str = "~/.cache/jet_jax"

    def __post_init__(self) -> None:
        for name, value, least in (
            ("align.steps", self.align.steps, 0),
            ("supernet.steps", self.supernet.steps, 0),
            ("align.accumulation", self.align.accumulation, 1),
            ("supernet.accumulation", self.supernet.accumulation, 1),
            ("linear.refit_batches", self.linear.refit_batches, 1),
            ("log_every", self.log_every, 1),
            ("checkpoint_every", self.checkpoint_every, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name in ("align", "supernet"):
            stage = getattr(self, name)
            if stage.optim.freeze or stage.optim.lr_multipliers:
                raise ValueError(
                    f"{name}.optim.freeze and lr_multipliers do not apply to a supernet"
                )
            if stage.steps:
                make_schedule(stage.optim, stage.steps)  # says whether warm-up and decay fit
        if self.final in ("blocks", "shapes") and getattr(self, self.final) is None:
            raise ValueError(f"final={self.final!r} takes what that comparison chose; set it")
        if self.final and self.final not in ("blocks", "shapes", *MIXERS):
            raise ValueError(f"final={self.final!r} is unknown; use blocks, shapes or a layer type")
        if self.final in ("attn", "swa"):
            raise ValueError(f"final={self.final!r} is what linear layers replace; name another")
        if self.shapes is not None and self.shapes.measure is None:
            raise ValueError("shapes are chosen by speed: shapes.measure must not be None")
        for name in TRAINED:
            if getattr(self, name) is not None:  # wrong settings come up now, not in hours
                TrainConfig.from_dict(self.training(name, self.teacher))
        if not self.teacher:
            raise ValueError("teacher is not set; give the directory of the model to convert")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; use {' or '.join(DTYPES)}")

    def training(self, name: str, student: str) -> dict[str, Any]:
        """The settings of a run of final training, those of the search filled in.

        The search's mesh, compile cache and teacher hold for it too, and what of its `data` is as
        usual is taken from the search's.

        Args:
          name: "distill" or "finetune".
          student: directory of the model that it starts from.
        """
        values = dict(getattr(self, name))
        usual = {f.name: f.default for f in dataclasses.fields(DataConfig)}
        usual |= {"train": (), "seq_len": None, "batch_size": None}  # which are the run's own
        own = {
            k: v for k, v in dict(values.get("data") or {}).items()
            if v is not None and v != usual.get(k) and tuple(np.atleast_1d(v)) != ()
        }  # fmt: skip
        values["data"] = dataclasses.asdict(self.data) | own
        values["distill"] = {**dict(values.get("distill") or {}), "teacher": self.teacher}
        values["dtype"] = values.get("dtype") or self.dtype
        fixed = {"init_from": student, "compile_cache": self.compile_cache}
        return values | fixed | {"mesh": dataclasses.asdict(self.mesh)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchConfig:
        """Builds the settings from plain nested values, as a config file gives them.

        Raises:
          ValueError: an unknown key (with the nearest known one), a missing one, or values that
            do not fit.
        """
        values = dict(values)
        if not values.get("teacher"):
            raise ValueError("teacher is not set; give the directory of the model to convert")
        if isinstance(values.get("data"), Mapping):
            own = None if values["data"].get("tokenizer") else tokenizer_dir(values["teacher"])
            values["data"] = {**values["data"], **({"tokenizer": str(own)} if own else {})}
        sections = {
            "data": DataConfig,
            "linear": LinearConfig,
            "align": StageConfig,
            "supernet": SupernetConfig,
            "placement": PlacementConfig,
            "measure": MeasureConfig,
            "mesh": MeshConfig,
            "distributed": DistributedConfig,
        }
        inner = {"optim": OptimConfig, "law": PathLaw, "loss": PathLoss}
        for name, section in sections.items():
            if not isinstance(values.get(name), Mapping):
                continue
            part = dict(values[name])
            for key, kind in inner.items():
                if isinstance(part.get(key), Mapping):
                    part[key] = build(kind, dict(part[key]), f"{name}.{key}")
            values[name] = build(section, part, name)
        for name in COMPARED:
            if isinstance(values.get(name), Mapping):
                values[name] = ComparisonConfig.from_dict(values[name], name)
        return build(cls, values, "the config")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict of all settings."""
        return dataclasses.asdict(self)


def final_comparison(config: SearchConfig) -> ComparisonConfig:
    """The layer type that `config.final` names, as the one arm of a comparison that only aligns."""
    return ComparisonConfig(
        arms={"final": ArmConfig(config.final, config.final_options)},
        learning_rates=(config.align.optim.lr,),
        seeds=(config.seed,),
        init=config.linear.init,
        refit_batches=config.linear.refit_batches,
        align_steps=config.align.steps,
        align_optim=config.align.optim,
        accumulation=config.align.accumulation,
        steps=1,
        measure=None,
    )
