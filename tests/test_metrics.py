"""Records, throughput, the picture, and what the terminal shows."""

import json
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny import tiny_config

from jet_jax import metrics, optim, progress, sharding, step
from jet_jax.loss_curve import plot_loss


def test_records_after_the_resumed_step_are_dropped(tmp_path):
    writer = metrics.MetricWriter(tmp_path)
    for n in range(1, 6):
        writer.write(n, "train", {"loss": 1.0 / n})
    writer.write(5, "sample", {"text": "Once upon"})
    writer.close()
    with open(tmp_path / metrics.RECORDS, "a") as file:
        file.write('{"step": 6, "ki')  # killed while writing
    assert len(metrics.read_records(tmp_path)) == 6

    writer = metrics.MetricWriter(tmp_path, start=3)
    writer.write(4, "train", {"loss": 0.0})
    writer.close()
    lines = [json.loads(x) for x in (tmp_path / metrics.RECORDS).read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in lines] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.0)]
    # A run that starts anew drops everything.
    metrics.MetricWriter(tmp_path).close()
    assert metrics.read_records(tmp_path) == []


def test_throughput_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed = metrics.Throughput(flops_per_token=1e9, peak=2e12)
    now[0] += 5.0
    speed.pause(3.0)
    lap = speed.lap(steps=4, tokens=8000)
    assert lap["step_seconds"] == 0.5 and lap["tokens_per_second"] == 4000
    assert lap["mfu"] == pytest.approx(4000 * 1e9 / (8 * 2e12))  # eight devices
    now[0] += 1.0
    assert metrics.Throughput(1.0, None).lap(1, 1).keys() == {"step_seconds", "tokens_per_second"}
    assert speed.lap(steps=1, tokens=10)["step_seconds"] == 1.0


def test_peak_flops_by_device():
    kind = lambda name: SimpleNamespace(device_kind=name)  # noqa: E731
    assert metrics.peak_flops(kind("NVIDIA H100 80GB HBM3")) == 989e12
    assert metrics.peak_flops(kind("NVIDIA H100 PCIe")) == 756e12
    assert metrics.peak_flops(kind("TPU v5 lite")) == 197e12
    assert metrics.peak_flops() is None  # a CPU
    assert metrics.memory_bytes()["host_memory"] > 2**26


def test_profiler_records_the_steps_asked_for(tmp_path):
    profiler = metrics.Profiler(tmp_path, start=2, steps=1)
    profiler.before(1, None)
    assert not (tmp_path / "profile").exists()
    profiler.before(2, None)
    profiler.after(2, None)
    profiler.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_loss_curve(tmp_path):
    assert plot_loss(tmp_path) is None
    records = [{"step": n, "kind": "train", "loss": 7.0 - n / 10} for n in range(1, 20)]
    records += [{"step": n, "kind": "valid", "loss": 7.0 - n / 11} for n in (0, 10, 19)]
    (tmp_path / metrics.RECORDS).write_text("".join(json.dumps(r) + "\n" for r in records))
    path = plot_loss(tmp_path, reference=6.3)
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 10_000


def test_parameter_table_joins_layers_and_names_what_does_not_divide():
    config = tiny_config(layer_types=("jet", "attn", "jet", "jet"))
    _, shapes = step.abstract_model(config)
    settings = optim.OptimConfig(freeze=("mlp",), lr_multipliers=((r"mixer\.q_proj", 0.5),))
    table = progress.parameter_table(shapes, sharding.make_mesh(2, 2, 2), settings)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    rows = {line[8:].split()[0]: line for line in capture.get().splitlines() if len(line) > 9}
    assert "tensor does not divide 257" in rows["embed_tokens.embedding"]
    assert rows["mixer.A_log"].startswith("0,2-3 ") and "whole" in rows["mixer.A_log"]
    assert "frozen" in rows["mlp.up_proj.kernel"] and "fsdp, tensor" in rows["mlp.up_proj.kernel"]
    assert "lr x 0.5" in rows["mixer.q_proj.kernel"] and "lr x 1" in rows["norm.scale"]
    assert f"{config.param_count():,}" in rows["total"]


def test_plain_lines_where_there_is_no_terminal(capsys):
    display = progress.Display(steps=100)
    values = {"loss": 1.5, "lr": 1e-3, "grad_norm": 0.25, "tokens_per_second": 1234.0}
    display.train(40, values | {"step_seconds": 2.0, "mfu": 0.41})
    display.close()
    line = capsys.readouterr().out
    assert "step 40/100" in line and "loss 1.5000" in line and "MFU 41.0%" in line
    assert "2:00 left" in line


def test_counts_are_told_now_and_then_where_there_is_no_terminal(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    display = progress.Display(0)
    for at, done in ((0, 0), (4, 16), (12, 48), (20, 80), (24, 96), (30, 0), (60, 10)):
        clock[0] = at
        display.count("paths", done, 400)
    display.close()
    assert capsys.readouterr().out.split("\n") == [
        "paths 48/400  1:28 left", "paths 96/400  1:16 left", "paths 10/400  19:30 left", ""
    ]  # fmt: skip


def test_a_live_count_begins_anew(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    display = progress.Display(0)
    for done in (0, 2, 3, 0, 1):
        display.count("paths", done, 3)
    display.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert "1/3 paths" in shown.split("\r")[-1]
