"""`train.py` with a teacher: it learns, goes on after a kill, and refuses what cannot be."""

import importlib
import re
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_run import read_config

import train
from configs.common import fields
from jet_jax import checkpoint, distill, io, optim
from jet_jax.distill import DistillConfig
from jet_jax.metrics import read_records
from jet_jax.models.lm import HybridLM
from jet_jax.params import abstract, flatten
from jet_jax.train_config import TrainConfig

# config_flags reads config files by an old function of Python's.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def student():
    swa = read_config().model.options("swa")
    mixers = {"gdn": {"num_heads": 2, "head_dim": 8}, "swa": swa}
    return read_config().model.replace(layer_types=("gdn", "swa"), mixers=mixers)


def settings(teacher, **parts) -> TrainConfig:
    """The tiny run on a mesh of one axis, with a teacher."""
    values = read_config("--config.compile_cache=").to_dict()
    values |= {
        "model": student().to_dict(),
        "mesh": {"data": 8},
        "distill": {**fields(DistillConfig).to_dict(), "teacher": str(teacher), **parts},
        "optim": {**values["optim"], "lr": 3e-2, "eps": 1e-8, "freeze": (r"\.mlp\.",)},
        "checkpoint_every": 4,
    }
    return TrainConfig.from_dict(values)


def run(config, workdir):
    made = train.prepare(config, workdir)
    with jax.set_mesh(made.mesh), made.stack:
        assert train.loop(made)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config = student().replace(layer_types=("swa", "swa"), mixers={"swa": student().options("swa")})
    path = tmp_path_factory.mktemp("teacher") / "model"
    io.save(HybridLM(config.replace(initializer_range=0.3), rngs=nnx.Rngs(1)), path)
    return path


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(settings(teacher), workdir)
    return workdir


def weights(workdir, step):
    where = workdir / "checkpoints" / str(step)
    return checkpoint.read_arrays(where, list(checkpoint.read_specs(where)))


def test_the_student_comes_closer_to_its_teacher(whole):
    valid, last = read_records(whole, "valid"), read_records(whole, "train")[-1]
    assert [r["step"] for r in valid] == [0, 6, 12]
    assert valid[-1]["kl"] < valid[0]["kl"] - 0.02
    assert {"loss", "accuracy", "kl", "tokens"} < valid[-1].keys()
    assert {"mse", "kl", "grad_norm", "lr", "tokens_per_second"} < last.keys()
    np.testing.assert_allclose(last["loss"], last["mse"] + last["kl"], rtol=1e-6)
    before, after = weights(whole, 4), weights(whole, 12)
    for name, value in after.items():  # the teacher is not among them, and MLPs stay
        assert np.array_equal(value, before[name]) == (".mlp." in name), name
    assert after.keys() == flatten(abstract(student())[1]).keys()


def test_a_run_goes_on_from_a_checkpoint_with_the_same_losses(whole, teacher):
    workdir = whole.with_name("resumed")
    shutil.copytree(whole, workdir)
    for step in (8, 12):  # what a kill after step 4 leaves
        shutil.rmtree(workdir / "checkpoints" / str(step))
    run(settings(teacher), workdir)
    ours, theirs = (
        [(r["step"], r["kind"], r["loss"], r["kl"]) for r in read_records(w)]
        for w in (workdir, whole)
    )
    assert len(ours) == 12 + 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine[:2] == other[:2]
        np.testing.assert_allclose(mine[2:], other[2:], rtol=1e-6)


def test_the_teachers_forward_pass_counts(teacher, tmp_path):
    config = settings(teacher, mse=0.0)
    made = train.prepare(config, tmp_path / "run")
    made.stack.close()
    passes = 3 * made.model.flops_per_token(16)
    assert made.flops_per_token == passes + io.load_config(teacher).flops_per_token(16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 2049}, "has vocab_size=2048, the student 2049"),
        ({"hidden_size": 24}, "has hidden_size=16, the student 24"),
        ({"layer_types": ("gdn", "swa", "swa")}, "has num_layers=2, the student 3"),
    ],
)
def test_students_that_do_not_fit(teacher, change, message, tmp_path):
    config = settings(teacher)
    values = config.to_dict() | {"model": config.model.replace(**change)}
    with pytest.raises(ValueError, match=f"distill.teacher: .*{message}"):
        train.prepare(TrainConfig.from_dict(values), tmp_path / "run")


def test_settings_that_cannot_be(teacher, tmp_path):
    for place, message in (("none", "does not exist"), ("", "holds no model")):
        with pytest.raises(ValueError, match=f"distill.teacher: .*{message}"):
            train.prepare(settings(tmp_path / place), tmp_path / "run")
    with pytest.raises(ValueError, match="unknown key 'kll' in distill; did you mean 'kl'"):
        settings(teacher, kll=1.0)
    with pytest.raises(ValueError, match="distill.teacher is missing"):
        settings("")
    values = settings(teacher).to_dict()
    with pytest.raises(ValueError, match="z_loss=0.1 belongs to the cross-entropy"):
        TrainConfig.from_dict(values | {"z_loss": 0.1})
    assert TrainConfig.from_dict(values).to_dict() == values


@pytest.mark.parametrize("name", ["distill", "distill_all"])
def test_shipped_configs(name, teacher):
    values = importlib.import_module(f"configs.{name}").get_config("runs/search/model").to_dict()
    assert values["init_from"] == "runs/search/model" and values["distill"]["teacher"] is None
    values["distill"]["teacher"] = str(teacher)
    values |= {"init_from": str(teacher), "data": {**values["data"], "train": ("x",)}}
    values["data"]["tokenizer"] = "t"
    config = TrainConfig.from_dict(values)
    paths = flatten(abstract(io.load_config(teacher))[1])
    factors = flatten(optim.lr_multipliers(abstract(io.load_config(teacher))[1], config.optim))
    frozen = {path for path in paths if any(re.search(p, path) for p in config.optim.freeze)}
    if name == "distill":
        assert (config.distill.mse, config.distill.kl, config.distill.ce) == (1, 1, 0)
        trained = {re.sub(r"layers\.\d+\.", "", path) for path in paths.keys() - frozen}
        assert {t.split(".")[0] for t in trained} == {"mixer", "input_layernorm"}
    else:
        assert (config.distill.mse, config.distill.kl, config.distill.ce) == (0, 1, 0)
        assert not frozen
        for path, factor in factors.items():
            rate = 3e-4 if ".mixer." in path else 3e-5
            assert config.optim.lr * factor == pytest.approx(rate), path
    assert distill.check_teacher(config.distill, io.load_config(teacher)).num_layers == 2
