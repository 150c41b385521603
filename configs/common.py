"""The settings of `train.py` with their defaults, for config files to start from.

A command line may only change settings that a config file has, so that a typo is an error; files
therefore start from all of them.
"""

import dataclasses
import types
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jet_jax.data import DataConfig
from jet_jax.optim import OptimConfig
from jet_jax.train_config import DistributedConfig, MeshConfig, TrainConfig


def defaults() -> Any:
    """A `ConfigDict` of all settings but the model and a teacher.

    Blanks are placeholders of the right type.
    """
    sections = ("data", "optim", "mesh", "distributed")
    config = fields(TrainConfig, leave_out=("model", "distill", *sections))
    config.data = fields(DataConfig)
    config.optim = fields(OptimConfig)
    config.mesh = fields(MeshConfig)
    config.distributed = fields(DistributedConfig)
    return config


def fields(section: type, leave_out: tuple[str, ...] = ()) -> ConfigDict:
    """The settings of one dataclass with their defaults."""
    hints = typing.get_type_hints(section)
    config = ConfigDict()
    for field in dataclasses.fields(section):
        if field.name in leave_out:
            continue
        value = field.default
        config[field.name] = _blank(hints[field.name]) if _is_blank(value) else value
    return config


def _is_blank(value) -> bool:
    return value is None or value is dataclasses.MISSING


def _blank(hint):
    """An empty tuple for a sequence, a placeholder of `int` for `int` and `int | None`."""
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    return placeholder(hint) if typing.get_origin(hint) is None else ()
