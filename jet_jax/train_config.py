"""The settings of a training run: one frozen dataclass, made once from a config file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jet_jax.config import DTYPES, ModelConfig
from jet_jax.data.config import DataConfig
from jet_jax.distill import DistillConfig
from jet_jax.io import tokenizer_dir
from jet_jax.mixer_options import build
from jet_jax.models import remat
from jet_jax.optim import OptimConfig


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh; one may be -1 and takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one a host; `num_processes=1` means that there is only this one.

    `coordinator` is `host:port` of process 0. With `num_processes=0` the cluster's own environment
    (Slurm, a TPU pod) is asked for all three.
    """

    coordinator: str = ""
    num_processes: int = 1
    process_id: int = 0

    def __post_init__(self) -> None:
        if self.num_processes > 1 and not self.coordinator:
            raise ValueError(
                f"distributed.num_processes={self.num_processes} needs "
                "distributed.coordinator=HOST:PORT of process 0."
            )


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `train.py` does, beyond where it writes.

    Attributes:
      steps: optimizer updates of the whole run.
      data: the text, see `DataConfig`.
      model: the model; None takes the one at `init_from`, and with both they must be equal.
      init_from: a Hugging Face directory, converted model or workdir whose weights training starts
        from, and whose tokenizer it uses unless `data.tokenizer` names another; empty starts from
        random weights.
      optim: optimizer and schedule, see `OptimConfig`.
      mesh: device mesh.
      distributed: processes.
      seed: seed of the random weights.
      dtype: compute dtype, `bfloat16` or `float32`; None takes the model's own.
      accumulation: parts that a batch is worked off in, to save memory.
      remat: what a layer keeps for its backward pass, see `jet_jax.models.remat`.
      z_loss: coefficient of the squared log-partition in the loss.
      distill: a teacher to learn from in place of the text alone, see `DistillConfig`; None for
        none.
      log_every: steps between records of the training metrics.
      eval_every: steps between validations; 0 for none but the last.
      eval_batches: batches of a validation; None for all.
      sample_every: steps between text samples; 0 for none but the last.
      sample_prompts: prompts of the text samples; empty for no samples.
      sample_tokens: length of a sample.
      sample_temperature: temperature of the samples; 0 is greedy.
      checkpoint_every: steps between checkpoints; 0 for none but the last.
      keep_checkpoints: checkpoints that are kept.
      profile_start: first step of a profiler trace.
      profile_steps: steps of the trace; 0 for none.
      compile_cache: folder of compiled programs, kept between runs; empty for none.
      unigram_entropy: loss in nats a token of a model that knows only token frequencies; a
        reference line in the loss curve.
    """

    steps: int
    data: DataConfig
    model: ModelConfig | None = None
    init_from: str = ""
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    seed: int = 0
    dtype: str | None = None
    accumulation: int = 1
    remat: str = "none"
    z_loss: float = 0.0
    distill: DistillConfig | None = None
    log_every: int = 10
    eval_every: int = 0
    eval_batches: int | None = None
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_tokens: int = 64
    sample_temperature: float = 0.0
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    profile_start: int = 10
    profile_steps: int = 0
    compile_cache: str = "~/.cache/jet_jax"
    unigram_entropy: float | None = None

    def __post_init__(self) -> None:
        if self.model is None and not self.init_from:
            raise ValueError("give a model, or init_from=PATH of a model to start from.")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; use {' or '.join(DTYPES)}.")
        for name in ("steps", "accumulation", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        remat.check(self.remat)
        if self.z_loss and self.distill is not None and not self.distill.ce:
            raise ValueError(f"z_loss={self.z_loss} belongs to the cross-entropy; set distill.ce.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Builds the settings from plain nested values, as a config file gives them.

        Raises:
          ValueError: for an unknown key (with the nearest known one), a missing one, or values
            that do not fit.
        """
        values = dict(values)
        if "sample_prompts" in values:
            values["sample_prompts"] = tuple(values["sample_prompts"])
        if values.get("init_from") and isinstance(values.get("data"), Mapping):
            own = None if values["data"].get("tokenizer") else tokenizer_dir(values["init_from"])
            values["data"] = {**values["data"], **({"tokenizer": str(own)} if own else {})}
        if isinstance(values.get("model"), Mapping):
            values["model"] = ModelConfig.from_dict(values["model"])
        sections = {
            "data": DataConfig,
            "optim": OptimConfig,
            "mesh": MeshConfig,
            "distributed": DistributedConfig,
            "distill": DistillConfig,
        }
        for name, section in sections.items():
            if isinstance(values.get(name), Mapping):
                values[name] = build(section, values[name], name)
        return build(cls, values, "the config")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict of all settings."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name, value in out.items():
            if name == "model":
                out[name] = None if value is None else value.to_dict()
            elif dataclasses.is_dataclass(value) and not isinstance(value, type):
                out[name] = dataclasses.asdict(value)
        return out
