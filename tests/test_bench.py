"""`jet-jax bench kernels` on a CPU, and what it makes of its measurements."""

import json

import jax
import pytest

from jet_jax.bench import kernels, rows
from jet_jax.bench.timing import Ceilings
from jet_jax.cli import main

REAL = {row.name: row for row in rows.all_rows(small=False)}


def test_rows_are_measured_and_written(tmp_path, capsys):
    path = tmp_path / "out.json"
    names = ["step-float32-b1", "conv-2b-grad"]
    assert main(["bench", "kernels", "--rows", *names, "--repeats=1", f"--json={path}"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in names) and "median" in out
    report = json.loads(path.read_text())
    assert report["copy_gb_s"] > 0 and report["matmul_tflop_s"] > 0
    assert [r["name"] for r in report["rows"]] == names
    for r in report["rows"]:
        assert r["implementation"] == "xla" and r["note"] is None
        assert r["ms"] > 0 and 0 < r["error"] < 8e-3  # bfloat16 beside float32
        assert r["fraction_of_floor"] == pytest.approx(r["floor_ms"] / r["ms"])
        assert r["gb_s"] == pytest.approx(r["bytes"] / r["ms"] / 1e6)


def test_the_rule_agrees_with_its_reference_and_refusals_are_told():
    small = {row.name: row for row in rows.all_rows(small=True)}
    row = small["rule-2b-grad"].small()
    row.sizes.update(T=32, K=72)  # a width that the kernels do not take
    results = list(kernels.run([row], ["pallas", "xla"], Ceilings(1.0, 1.0), repeats=1))
    refused, measured = results
    assert refused["ms"] is None and "K=72" in refused["note"]
    assert measured["ms"] > 0 and measured["error"] < 1e-2


def test_the_list_names_every_row(capsys):
    assert main(["bench", "kernels", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{out}" for name in REAL)


def test_work_that_cannot_be_avoided():
    """Bytes and floors worked out by hand for B8 T8192 H12 K96 V256 and for B128 steps."""
    row = REAL["rule-2b"]
    assert row.num_bytes() == 8 * 8192 * 12 * (2 * (96 + 96 + 256 + 256) + 8)
    assert 1e3 * Ceilings(3000.0, 790.0).floor_seconds(
        row.num_bytes(), row.flops()
    ) == pytest.approx(0.371, abs=1e-3)
    step = REAL["step-float32-b128"]
    assert step.num_bytes() == 128 * 12 * (2 * 96 * 256 * 4 + 2 * (96 + 96 + 256 + 256) + 8)
    conv = REAL["conv-2b"]
    assert conv.flops() == 2 * 65536 * 384 * 4 * 3072
    assert Ceilings(3000.0, 790.0).floor_seconds(conv.num_bytes(), conv.flops()) == pytest.approx(
        0.783e-3, abs=1e-6
    )


@pytest.mark.parametrize(
    "name", ["rule-4b", "rule-2b-grad", "step-bfloat16-b8", "conv-4b", "conv-2b-grad"]
)
def test_bytes_count_inputs_and_outputs_once(name):
    row = REAL[name] if REAL[name].steps == 1 else REAL[name].small()
    inputs = jax.eval_shape(row.inputs, jax.random.key(0))
    outputs = jax.eval_shape(row.function("xla"), *inputs)
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs)))
    backward = row.what == rows.BOTH
    # Forward and backward each read the inputs.
    again = sum(x.size * x.dtype.itemsize for x in inputs[:-1]) if backward else 0
    assert row.num_bytes() == total + again


def test_growth_compares_equal_numbers_of_tokens():
    def result(batch, length, ms):
        return {
            "name": f"length-{length}",
            "implementation": "xla",
            "what": "forward",
            "sizes": {"B": batch, "T": length},
            "ms": ms,
        }

    assert kernels.growth([result(4, 8, 2.0), result(2, 16, 9.0), result(1, 32, 3.0)]) == {
        "xla, forward": 1.5
    }
    assert kernels.growth([result(4, 8, 2.0), result(2, 32, 3.0)]) == {}
    assert kernels.growth([result(4, 8, 2.0), result(1, 32, None)]) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "conv-2b", "attention"], "no row is called 'attention'; there are rule-2b,"),
        (["--repeats=0"], "--repeats 0 must be at least 1"),
        (["--json", "missing/out.json"], "lies in a directory that does not exist"),
        (["--json", "."], "is a directory"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "run", None)
    monkeypatch.setattr("jet_jax.bench.timing.measure_ceilings", None)
    assert main(["bench", "kernels", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_kind_must_be_named(capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench"])
    assert error.value.code == 2 and "KIND" in capsys.readouterr().err
