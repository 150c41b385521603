"""The shipped config files build what they say."""

import importlib

import pytest

from jet_jax.config import ModelConfig
from jet_jax.train_config import TrainConfig

TEXT = {"train": ("x.txt",), "tokenizer": "tokenizer"}


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("jet2b", 1_964_806_208, {"jet": 24, "attn": 2, "swa": 2}),
        ("jet4b", 3_960_424_768, {"jet": 26, "attn": 3, "swa": 7}),
    ],
)
def test_jet_nemotron_sizes(name, parameters, layers):
    values = importlib.import_module(f"configs.{name}").get_config().to_dict()
    config = TrainConfig.from_dict(values | {"data": {**values["data"], **TEXT}})
    model = config.model
    assert model.param_count() == parameters
    assert {kind: model.layer_types.count(kind) for kind in layers} == layers
    assert ModelConfig(**values["model"]) == model == ModelConfig.from_dict(model.to_dict())


def test_quickstart():
    module = importlib.import_module("configs.quickstart")
    config = TrainConfig.from_dict(module.get_config().to_dict())
    assert {"jet", "swa", "attn"} == set(config.model.layer_types)
    assert TrainConfig.from_dict(config.to_dict()) == config
    assert TrainConfig.from_dict(module.get_config("smoke").to_dict()).steps == 20
    with pytest.raises(ValueError, match="the only variant is :smoke"):
        module.get_config("fast")


def test_settings_without_text_or_model_say_so():
    values = importlib.import_module("configs.finetune").get_config().to_dict()
    with pytest.raises(ValueError, match="data.train"):
        TrainConfig.from_dict(values)
    with pytest.raises(ValueError, match="give a model, or init_from=PATH"):
        TrainConfig.from_dict(values | {"data": {**values["data"], **TEXT}})
