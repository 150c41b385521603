"""Two processes train one model: one set of records and one checkpoint, equal to one process's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import CONFIG, read_config

import train
from jet_jax import checkpoint, io, step
from jet_jax.metrics import read_records

# config_flags reads config files by an old function of Python's.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[1]
SETTINGS = (
    "--config.steps=4", "--config.eval_every=4", "--config.mesh.data=-1", "--config.mesh.fsdp=2",
    "--config.mesh.tensor=1", "--config.checkpoint_every=0", "--config.compile_cache=",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir: Path, *arguments: str) -> subprocess.Popen:
    """Starts a process that has two devices."""
    command = [
        sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}",
        *SETTINGS, *arguments,
    ]  # fmt: skip
    count = "--xla_force_host_platform_device_count="
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"{count}8", f"{count}2")}
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-3000:]
    return output


def test_two_processes(tmp_path):
    workdir = tmp_path / "two"
    cluster = (f"--config.distributed.coordinator=127.0.0.1:{free_port()}",
               "--config.distributed.num_processes=2")  # fmt: skip
    processes = [start(workdir, *cluster, f"--config.distributed.process_id={i}") for i in range(2)]
    first, second = (finish(process) for process in processes)
    assert "Finished." in first
    assert "Finished." not in second and "loss" not in second  # only process 0 reports
    records = read_records(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4]

    # Validation sees the same rows whatever the number of processes.
    model = io.load(workdir, dtype="float32")
    where = io.kind_of(workdir)[1]
    saved = checkpoint.read_arrays(where, list(checkpoint.read_specs(where)))
    table = np.asarray(model.embed_tokens.embedding[...])
    np.testing.assert_array_equal(table, saved["embed_tokens.embedding"])
    alone = train.prepare(read_config(*SETTINGS), tmp_path / "one")  # this process, 8 devices
    with alone.stack:
        values = step.evaluate(alone.eval_step, alone.state.all_params(), alone.valid, alone.mesh)
    untrained = next(r["loss"] for r in read_records(workdir, "valid") if r["step"] == 0)
    assert abs(untrained - values["loss"]) < 1e-5
