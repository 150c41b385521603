"""What later stages of a search would refuse hours later, found on a few layers that stand in."""

from __future__ import annotations

from pathlib import Path

from jax.sharding import Mesh

from jet_jax import optim, sharding
from jet_jax.config import ModelConfig
from jet_jax.data.sources import find_files
from jet_jax.postnas.arm_runs import ArmRuns
from jet_jax.postnas.comparison import judges_of
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.shape_comparison import check_shape_arms
from jet_jax.step import abstract_model
from jet_jax.train_config import TrainConfig


def check_comparison(name: str, settings: ComparisonConfig, context: ComparisonContext) -> None:
    """Raises ValueError, naming the comparison, for arms or objectives that do not fit.

    Args:
      name: "blocks", "ablations", "shapes" or "final".
      settings: of the comparison.
      context: what its arms share; its teacher may be a `stand_in`.
    """
    try:
        judges_of(settings, context)
        sharding.check_batch(context.data.batch_size, context.mesh, settings.accumulation)
        if name == "shapes":
            check_shape_arms(settings, context)
        for arm in settings.arms:
            ArmRuns(arm, settings, context, Path()).check()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def check_training(name: str, config: TrainConfig, student: ModelConfig, mesh: Mesh) -> None:
    """Raises ValueError, naming the run, for text, patterns or a batch that do not fit.

    Args:
      name: "distill" or "finetune".
      config: settings of the run.
      student: the model that trains; a few layers of each kind do.
      mesh: device mesh.
    """
    try:
        find_files((*config.data.train, *config.data.valid))
        sharding.check_batch(config.data.batch_size, mesh, config.accumulation)
        trainable, _ = optim.partition(abstract_model(student)[1], config.optim.freeze)
        optim.lr_multipliers(trainable, config.optim)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
