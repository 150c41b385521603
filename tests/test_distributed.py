"""Two processes train one model: one set of records and one checkpoint, equal to one process's."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from jet_jax import checkpoint, io
from jet_jax.metrics import read_records

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir: Path, devices: int, *arguments: str) -> subprocess.Popen:
    command = [
        sys.executable, "train.py", "--config=tests/train_configs/tiny.py",
        f"--workdir={workdir}", "--config.steps=4", "--config.eval_every=4",
        "--config.mesh.data=-1", "--config.mesh.fsdp=2", "--config.mesh.tensor=1",
        "--config.checkpoint_every=0", "--config.compile_cache=", *arguments,
    ]  # fmt: skip
    env = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
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
    processes = [
        start(workdir, 2, *cluster, f"--config.distributed.process_id={i}") for i in range(2)
    ]
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
    alone = tmp_path / "one"
    finish(start(alone, 4))

    def untrained(folder):
        return next(r["loss"] for r in read_records(folder, "valid") if r["step"] == 0)

    assert abs(untrained(workdir) - untrained(alone)) < 1e-5
