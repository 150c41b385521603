"""`train.py` as a user runs it: killed, stopped, resumed, and given bad settings."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from tiny_run import CONFIG, read_config

import train
from jet_jax import checkpoint, io, train_run
from jet_jax.data import load_tokenizer
from jet_jax.data.iterator import TrainIterator
from jet_jax.metrics import read_records
from jet_jax.params import abstract, flatten
from jet_jax.step import TrainState
from jet_jax.text_samples import TextSampler
from jet_jax.train_checkpoint import TrainCheckpoints
from jet_jax.train_config import TrainConfig

# config_flags reads config files by an old function of Python's.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[1]


def start(workdir: Path, cache: Path, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}",
        f"--config.compile_cache={cache}", *arguments,
    ]  # fmt: skip
    log = open(workdir.with_suffix(".log"), "a")
    env = os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # small programs too
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)


def finish(process: subprocess.Popen, workdir: Path) -> str:
    code = process.wait(timeout=300)
    output = workdir.with_suffix(".log").read_text()
    assert code == 0, output[-3000:]
    return output


def signal_after(process: subprocess.Popen, workdir: Path, step: int, number: int) -> None:
    """Sends a signal as soon as the records hold `step`."""
    for _ in range(30000):
        if any(r["step"] >= step for r in read_records(workdir, "train")):
            process.send_signal(number)
            return
        assert process.poll() is None, workdir.with_suffix(".log").read_text()[-3000:]
        time.sleep(0.01)
    raise AssertionError("the run did not get so far")


def final(workdir: Path) -> dict[str, np.ndarray]:
    where = io.kind_of(workdir)[1]
    assert where.name == "12"
    return checkpoint.read_arrays(where, list(checkpoint.read_specs(where)))


def losses(workdir: Path) -> list[tuple[int, str, float]]:
    keys = ("train", "valid")
    return [(r["step"], r["kind"], r["loss"]) for r in read_records(workdir) if r["kind"] in keys]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compile_cache")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache):
    """The run that nothing happens to; in a process of its own, like those it is compared with."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    finish(start(workdir, cache), workdir)
    return workdir


@pytest.fixture(scope="module")
def killed(uninterrupted, cache):
    """A run killed with SIGKILL between two checkpoints."""
    workdir = uninterrupted.with_name("killed")
    process = start(workdir, cache)
    signal_after(process, workdir, 5, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert checkpoint.steps(workdir / "checkpoints")[-1] < 12
    return workdir


def test_killed_stopped_and_resumed_run_is_bit_equal(uninterrupted, killed, cache):
    workdir = killed.with_name("resumed")
    shutil.copytree(killed, workdir)
    process = start(workdir, cache)
    signal_after(process, workdir, 8, signal.SIGTERM)
    output = finish(process, workdir)
    stopped_at = checkpoint.steps(workdir / "checkpoints")[-1]
    if stopped_at < 12:  # else the signal came with the last step
        assert f"SIGTERM: saving step {stopped_at}." in output
        assert "Stopped; the same command continues." in output
        output = finish(start(workdir, cache), workdir)
        assert f"Continuing from step {stopped_at} of 12." in output
    assert "Finished." in output and (workdir / "loss_curve.png").stat().st_size > 5000

    want, got = final(uninterrupted), final(workdir)
    assert got.keys() == want.keys() and len(got) > 20
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    # Each step is recorded once, with the very same loss.
    assert losses(workdir) == losses(uninterrupted)
    assert len(losses(workdir)) == 12 + 3


def test_resumed_on_another_mesh_agrees(uninterrupted, killed):
    workdir = killed.with_name("other_mesh")
    shutil.copytree(killed, workdir)
    mesh = ("--config.mesh.data=8", "--config.mesh.fsdp=1", "--config.mesh.tensor=1")
    run = train.prepare(read_config("--config.compile_cache=", *mesh), workdir)
    with jax.set_mesh(run.mesh), run.stack:
        assert train.loop(run)
    want, got = final(uninterrupted), final(workdir)
    for name in want:
        error = np.linalg.norm(got[name] - want[name]) / np.linalg.norm(want[name])
        assert error < 1e-5, (name, error)
    for a, b in zip(losses(workdir), losses(uninterrupted), strict=True):
        assert a[:2] == b[:2] and abs(a[2] / b[2] - 1) < 1e-5


def test_the_run_learns_and_its_workdir_is_a_model(uninterrupted):
    valid = read_records(uninterrupted, "valid")
    assert [r["step"] for r in valid] == [0, 6, 12]
    assert valid[0]["loss"] > valid[1]["loss"] > valid[2]["loss"]
    model = io.load(uninterrupted, dtype="float32")
    assert model.config == read_config().model
    assert io.tokenizer_dir(uninterrupted) == uninterrupted / "tokenizer"
    record = read_records(uninterrupted, "train")[-1]
    names = {"loss", "accuracy", "grad_norm", "lr", "tokens_per_second", "step_seconds"}
    assert names < record.keys() and record["host_memory"] > 2**26
    assert list((uninterrupted / "tensorboard").iterdir())


def test_training_starts_from_a_model(uninterrupted, tmp_path):
    config = read_config(
        f"--config.init_from={uninterrupted}", "--config.data.tokenizer=", "--config.compile_cache="
    )
    assert config.data.tokenizer == str(uninterrupted / "tokenizer")
    run = train.prepare(config, tmp_path / "tuned")
    assert int(run.state.step) == 0
    got = flatten(jax.device_get(run.state.all_params()))
    for name, value in final(uninterrupted).items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    run.stack.close()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.lrr=1", 'Did you mean "lr"'),
        ("--config.stepz=1", 'Did you mean "steps"'),
        ("--config.remat=some", "unknown remat policy 'some'"),
        ("--config.accumulation=0", "accumulation=0 must be at least 1"),
        ("--config.dtype=float16", "dtype='float16' is unknown"),
        ("--config.optim.schedule=step", "use one of cosine, wsd, constant"),
        ("--config.distributed.num_processes=2", "needs distributed.coordinator"),
    ],
)
def test_bad_settings(argument, message):
    with pytest.raises((ValueError, AttributeError, KeyError)) as error:
        read_config(argument)
    assert message in str(error.value)


def test_typo_on_the_command_line_is_one_line(tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, tmp_path, "--config.optim.lrr=1")
    assert process.wait(timeout=120) == 1
    output = workdir.with_suffix(".log").read_text().strip()
    assert output == 'train.py: error: no setting \'lrr\' Did you mean "lr" instead of "lrr"?'
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.data.batch_size=6"], "batch_size=6 is not divisible by 4"),
        (["--config.mesh.data=3"], "does not fit 8 devices"),
        (["--config.optim.freeze=('mlpp',)"], "'mlpp' matches no parameter"),
    ],
)
def test_settings_that_do_not_fit_together(arguments, message, tmp_path):
    with pytest.raises(ValueError) as error:
        train.prepare(read_config("--config.compile_cache=", *arguments), tmp_path / "run")
    assert message in str(error.value)


def test_unknown_keys_in_a_config_file():
    values = {"steps": 1, "data": {"train": "x", "tokenizer": "y"}, "init_from": "z"}
    with pytest.raises(ValueError, match="unknown key 'lrr' in optim; did you mean 'lr'"):
        TrainConfig.from_dict(values | {"optim": {"lrr": 1}})
    with pytest.raises(ValueError, match="unknown key 'stepz' in the config"):
        TrainConfig.from_dict(values | {"stepz": 1})


def test_workdir_with_another_models_checkpoint(uninterrupted):
    arguments = ("--config.compile_cache=", "--config.model.intermediate_size=48")
    with pytest.raises(ValueError) as error:
        train.prepare(read_config(*arguments), uninterrupted)
    message = str(error.value)
    assert "holds another model" in message and str(uninterrupted) in message
    assert "intermediate_size: 32 there, 48 here" in message and "--workdir" in message


def test_number_formats_do_not_make_another_model(uninterrupted):
    """The config's dtype is what `config.dtype` overrides, so it must not stop a continuation."""
    checkpoints = TrainCheckpoints(uninterrupted)
    model = read_config().model.replace(dtype="bfloat16", state_dtype="bfloat16")
    assert checkpoints.resolve_model(model, "") == model
    checkpoints.close()


@contextlib.contextmanager
def made_up_run(workdir, *arguments, at_step, valid=()):
    """A run without a model; `at_step(n)` is called in step n and gives metrics other than 1."""
    config = read_config(*arguments)

    def train_step(state, batch):
        state = TrainState(state.step + 1, {}, {}, {})
        names = ("loss", "grad_norm", "accuracy", "tokens", "lr")
        return state, dict.fromkeys(names, jax.numpy.ones(())) | at_step(state.step)

    checkpoints = mock.Mock(spec=TrainCheckpoints)
    batches = mock.MagicMock(spec=TrainIterator)
    batches.__next__.return_value = {"tokens": np.zeros((8, 16), np.int32)}
    with contextlib.ExitStack() as stack:
        yield train_run.Run(
            config, workdir, config.model, train_run.sharding.make_mesh(8),
            TrainState(0, {}, {}, {}), train_step, None, batches, list(valid), checkpoints, None,
            stack,
        )  # fmt: skip


def test_weights_that_are_no_numbers_are_not_saved(tmp_path):
    """The gradient is lost at step 2, whose metrics are not due, and a checkpoint is."""
    settings = ("--config.log_every=10", "--config.checkpoint_every=2")

    def at_step(n):
        return {"grad_norm": jax.numpy.nan} if n == 2 else {}

    with made_up_run(tmp_path, *settings, at_step=at_step) as run:
        with pytest.raises(FloatingPointError, match="grad_norm is nan at step 2"):
            train.loop(run)
    assert not run.checkpoints.save.called


@pytest.mark.parametrize(("at", "finished"), [(2, False), (12, True), ("evaluation", True)])
def test_a_stop_is_noted_whenever_it_comes(tmp_path, monkeypatch, at, finished):
    """In the last step, or in the evaluation after it, the run is finished as well."""
    steps = []

    def at_step(n):
        steps.append(n)
        if n == at:
            signal.raise_signal(signal.SIGTERM)
        return {}

    def evaluate(*args):
        if at == "evaluation" and steps == list(range(1, 13)):
            signal.raise_signal(signal.SIGTERM)
        return {"loss": 1.0}

    monkeypatch.setattr(train_run.step, "evaluate", evaluate)
    with made_up_run(tmp_path, at_step=at_step, valid=[{}]) as run:
        assert train.loop(run) == finished
    assert run.stopped
    assert run.checkpoints.save.call_args.args[0] == steps[-1] == (12 if finished else 2)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "sample_prompts: prompt 0 is empty"),
        ("Once", {"tokens": 0}, "sample_tokens=0 must be at least 1"),
        ("Once", {"temperature": -1.0}, "temperature=-1.0 must be a finite number"),
    ],
)
def test_samples_that_cannot_be_made_are_refused_before_training(prompt, options, message):
    config = read_config()
    tokenizer = load_tokenizer(config.data.tokenizer)
    graphdef, weights = abstract(config.model)
    with pytest.raises(ValueError, match=message):
        TextSampler(graphdef, weights, tokenizer, (prompt,), **options)


def test_optimizer_state_that_does_not_fit(uninterrupted):
    arguments = ("--config.compile_cache=", "--config.optim.freeze=('mlp',)")
    with pytest.raises(ValueError, match="optim.freeze must stay as"):
        train.prepare(read_config(*arguments), uninterrupted)
