"""The settings of a comparison of layers: the arms, and how each is trained and judged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jet_jax.config import known_types
from jet_jax.mixer_options import OPTIONS, build
from jet_jax.models import remat
from jet_jax.optim import OptimConfig, make_schedule
from jet_jax.option_checks import require, require_positive
from jet_jax.postnas.inherit import INITS
from jet_jax.postnas.training import PathLoss

NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"  # arms give folders their names


@dataclass(frozen=True)
class ArmConfig:
    """What stands where the placement keeps no attention.

    Attributes:
      kind: layer type, of `MIXERS`.
      options: changes to the options that match the attention's heads.
    """

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", dict(self.options))
        require(self.kind != "attn", "full attention is what the arms replace; compare other kinds")
        require(
            self.kind in OPTIONS,
            f"layer type {self.kind!r} is unknown; known types: {known_types()}",
        )


@dataclass(frozen=True)
class MeasureConfig:
    """Sizes at which decoding and prefill are timed; see `measuring.measure`.

    Attributes:
      context: tokens that each cache holds when decoding begins.
      batch: sequences that decode at once.
      prefill_length: tokens of a prompt.
      chunk: tokens of a prompt that are prefilled at once.
      prefill_batch: prompts that are prefilled at once.
      repeats: timings, the median of which counts.
    """

    context: int = 16384
    batch: int = 8
    prefill_length: int = 16384
    chunk: int = 2048
    prefill_batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require_positive(f"measure.{name}", value)


@dataclass(frozen=True)
class ComparisonConfig:
    """A comparison. Arms differ in their layers alone: placement, seeds, data and steps are shared.

    Each arm and seed is aligned once, teacher-forced. From the first seed's alignment a short run
    at each learning rate picks the arm's own; at that rate every seed then trains on from its
    alignment, and is judged.

    Attributes:
      arms: name -> `ArmConfig`, or its fields; see `arms.block_arms`.
      reference: the arm that the others are compared with; may be left out for the first one.
      judged_by: names of objectives; empty takes all there are.
      learning_rates: peaks to choose from, for each arm on its own.
      seeds: training runs; one seed fixes data order and new weights for all arms alike.
      init: how the new layers start: `copy`, `copy_refit` or `random`, as for a supernet.
      refit_batches: batches that `copy_refit` fits on.
      align_steps: steps of the alignment; 0 leaves it out.
      align_optim: its optimizer.
      tuning_steps: steps of a run that tries a learning rate.
      steps: steps of a run that counts.
      optim: optimizer of both; `lr` is taken from `learning_rates`.
      loss: what both are trained on, on the hybrid's own stream.
      trains: patterns of the weights that train in both; alignment trains the new layers alone.
      remat: what a layer keeps for its backward pass, see `jet_jax.models.remat`. "none" is faster
        where memory allows it; training speeds compare at one setting alone.
      accumulation: parts that a batch is worked off in, to save memory. Errors are normalised in
        each part by its own variance, so all arms have one number of parts.
      measure: sizes for decoding and prefill; None times neither.
      keep_weights: whether the trained weights stay on disk. Without them the arm that becomes the
        hybrid is aligned once more.
    """

    arms: Any
    reference: str = ""
    judged_by: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = (3e-4, 5e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2, 3)
    init: str = "copy"
    refit_batches: int = 4
    align_steps: int = 0
    align_optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    tuning_steps: int = 100
    steps: int = 200
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(weight_decay=0.0))
    loss: PathLoss = field(default_factory=PathLoss)
    trains: tuple[str, ...] = (r"^layers\.\d+\.(mixer|input_layernorm)\.",)
    remat: str = "full"
    accumulation: int = 1
    measure: MeasureConfig | None = field(default_factory=MeasureConfig)
    keep_weights: bool = False

    def __post_init__(self) -> None:
        arms = {
            name: arm if isinstance(arm, ArmConfig) else build(ArmConfig, dict(arm), f"arm {name}")
            for name, arm in dict(self.arms).items()
        }
        require(bool(arms), "a comparison needs arms; see jet_jax.postnas.arms.block_arms")
        for name in arms:
            require(
                re.fullmatch(NAME, name) is not None,
                f"arm {name!r} names a folder: use letters, digits and _ . + - alone",
            )
        put = object.__setattr__
        put(self, "arms", arms)
        put(self, "reference", self.reference or next(iter(arms)))
        for name, kind in (("judged_by", str), ("trains", str), ("seeds", int)):
            put(self, name, tuple(kind(x) for x in getattr(self, name)))
        put(self, "learning_rates", tuple(float(x) for x in self.learning_rates))
        self._check()

    def _check(self) -> None:
        require(
            self.reference in self.arms,
            f"reference={self.reference!r} is no arm; there are {', '.join(self.arms)}",
        )
        require(self.init in INITS, f"init={self.init!r} is unknown; use {', '.join(INITS)}")
        for name in ("learning_rates", "seeds"):
            values = getattr(self, name)
            require(
                len(values) >= 1 and len(set(values)) == len(values),
                f"{name}={values} must name at least one, each once",
            )
        require(min(self.learning_rates) > 0, f"learning_rates={self.learning_rates}: all above 0")
        require(min(self.seeds) >= 0, f"seeds={self.seeds} must not be negative")
        remat.check(self.remat)
        require(bool(self.trains), "trains is empty; name patterns of the weights that train")
        for name in ("steps", "refit_batches", "accumulation"):
            require_positive(name, getattr(self, name))
        require(self.align_steps >= 0, f"align_steps={self.align_steps} must not be negative")
        for name, steps in self.lengths.items():
            optim = self.align_optim if name == "align_steps" else self.optim
            which = "align_optim" if name == "align_steps" else "optim"
            require(
                not optim.freeze,
                f"{which}.freeze does not apply to a comparison; set trains instead",
            )
            try:
                make_schedule(optim, steps)
            except ValueError as error:
                raise ValueError(f"{name}={steps}: {error}") from error

    @property
    def lengths(self) -> dict[str, int]:
        """The steps of every sort of run that there is."""
        out = {"align_steps": self.align_steps, "steps": self.steps}
        if len(self.learning_rates) > 1:
            require_positive("tuning_steps", self.tuning_steps)
            out["tuning_steps"] = self.tuning_steps
        return {name: steps for name, steps in out.items() if steps}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "comparison") -> ComparisonConfig:
        """Builds the settings from plain nested values, as a config file gives them.

        Args:
          values: the fields.
          where: the section's name, for messages.

        Raises:
          ValueError: an unknown key (with the nearest known one) or values that do not fit.
        """
        values = dict(values)
        inner = {
            "optim": OptimConfig,
            "align_optim": OptimConfig,
            "loss": PathLoss,
            "measure": MeasureConfig,
        }
        for name, kind in inner.items():
            if isinstance(values.get(name), Mapping):
                values[name] = build(kind, dict(values[name]), f"{where}.{name}")
        try:
            return build(cls, values, where)
        except ValueError as error:
            text = str(error)
            raise ValueError(text if where in text else f"{where}: {text}") from error
