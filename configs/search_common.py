"""The settings of `search.py` with their defaults, for config files to start from."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs.common import fields
from jet_jax.data import DataConfig
from jet_jax.optim import OptimConfig
from jet_jax.postnas.comparison_config import ComparisonConfig, MeasureConfig
from jet_jax.postnas.paths import PathLaw
from jet_jax.postnas.placement_config import ObjectiveConfig, PlacementConfig
from jet_jax.postnas.search_config import (
    COMPARED,
    TRAINED,
    LinearConfig,
    SearchConfig,
    StageConfig,
    SupernetConfig,
)
from jet_jax.postnas.training import PathLoss
from jet_jax.train_config import DistributedConfig, MeshConfig


def defaults() -> Any:
    """A `ConfigDict` of all settings; `objective` adds what to search by, `comparison` blocks."""
    sections = ("data", "linear", "align", "supernet", "placement", "mesh", "distributed")
    config = fields(
        SearchConfig, leave_out=(*sections, *COMPARED, *TRAINED, "final_options", "measure")
    )
    config.data = fields(DataConfig)
    config.linear = fields(LinearConfig, leave_out=("options",))
    config.linear.options = ConfigDict()
    config.align = fields(StageConfig, leave_out=("optim",))
    config.supernet = fields(SupernetConfig, leave_out=("optim", "law", "loss"))
    config.supernet.law = fields(PathLaw)
    config.supernet.loss = fields(PathLoss)
    for stage in (config.align, config.supernet):
        stage.optim = fields(OptimConfig)
        stage.optim.weight_decay = 0.0
    config.placement = fields(PlacementConfig, leave_out=("objectives",))
    config.placement.objectives = ConfigDict()
    config.mesh = fields(MeshConfig)
    config.distributed = fields(DistributedConfig)
    config.measure = fields(MeasureConfig)
    return config


def objective(task: str, **changes: Any) -> ConfigDict:
    """An objective with all of its settings."""
    out = fields(ObjectiveConfig)
    out.task = task
    for name, value in changes.items():
        out[name] = value
    return out


def comparison(arms: Mapping[str, Any], **changes: Any) -> ConfigDict:
    """A comparison of layers with all of its settings, for `blocks`, `ablations` or `shapes`."""
    inner = {"loss": PathLoss, "measure": MeasureConfig}
    optims = ("optim", "align_optim")
    out = fields(ComparisonConfig, leave_out=("arms", *optims, *inner))
    for name, section in inner.items():
        out[name] = fields(section)
    for name in optims:
        out[name] = fields(OptimConfig)
        out[name].weight_decay = 0.0
    out.arms = ConfigDict({name: dict(arm) for name, arm in arms.items()})
    for name, value in changes.items():
        out[name] = value
    return out
