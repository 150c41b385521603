"""The settings of train_configs/tiny.py, for runs of `train.py` inside the tests' own process."""

import sys
from pathlib import Path
from unittest import mock

from absl import flags
from ml_collections import config_flags

from jet_jax.train_config import TrainConfig

ROOT = Path(__file__).parents[1]
CONFIG = "tests/train_configs/tiny.py"


def read_config(*arguments: str) -> TrainConfig:
    """The settings as the command line gives them."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values)
    command = ["train.py", f"--config={ROOT / CONFIG}", *arguments]
    with mock.patch.object(sys, "argv", command):  # where config_flags looks for overrides
        values(command)
    return TrainConfig.from_dict(values.config.to_dict())
