"""The parts of the benchmark scripts that need no accelerator."""

import importlib.util
import sys
from pathlib import Path

import jax
import pytest

from jet_jax.bench import rows
from kernels_pallas import backend
from kernels_pallas.gated_delta_rule import step_pallas

FOLDER = Path(__file__).parent.parent / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_tuner_keeps_the_best_of_one_field_after_another():
    tuner = script("tune_kernels")
    row = rows.OneStep("step", {"B": 1, "H": 1, "K": 64, "V": 64})
    space = tuner.space(row)
    shapes = jax.eval_shape(row.inputs, jax.random.key(0))
    times, programs = iter([3.0, 1.0, 2.0, 0.5, 4.0]), []

    def measure(program):
        programs.append(program.as_text())
        return next(times)

    fields = {"v_block": (64, 16, 32), "warps": (1, 8)}
    table = step_pallas.find_step_blocks
    tried = list(
        tuner.tune(lambda: row.function("pallas"), measure, shapes, space, fields, row.donated)
    )
    assert [(field, value) for field, value, *_ in tried] == [
        (field, value) for field, values in fields.items() for value in values
    ]
    best = tried[-1][-1]
    assert (best.v_block, best.warps) == (16, 1)
    # The blocks reached the kernels: other blocks of V, another program. Warps do not count here.
    assert len(set(programs[:3])) == 3 and programs[1] == programs[3] == programs[4]
    assert step_pallas.find_step_blocks is table


@pytest.mark.parametrize("name", ["rule-2b", "rule-2b-grad", "step-float32-b8", "conv-2b-grad"])
def test_the_tuner_knows_every_operations_table(name):
    tuner = script("tune_kernels")
    (row,) = (row for row in rows.all_rows(small=False) if row.name == name)
    space = tuner.space(row)
    with backend.compile_for("gpu"):
        blocks = space.current(
            row.function("pallas"), jax.eval_shape(row.inputs, jax.random.key(0))
        )
    for field, values in space.fields.items():
        for value in values:
            changed = tuner.replaced(blocks, field, value)
            assert getattr(changed, field) == value and type(changed) is type(blocks)
    if row.op == "gated_delta_rule":  # its blocks are Pallas's alone
        with space.override(blocks):
            used = getattr(space.module, space.table)("gpu", 96)
        assert (blocks.driver, used.driver) == (None, "pallas")


def test_the_tuner_tells_what_does_not_compile():
    tuner = script("tune_kernels")
    row = rows.OneStep("step", {"B": 1, "H": 1, "K": 64, "V": 64})
    shapes = jax.eval_shape(row.inputs, jax.random.key(0))
    tried = tuner.tune(
        lambda: row.function("pallas"),
        lambda program: 1.0,
        shapes,
        tuner.space(row),
        {"v_block": (48, 64)},
        row.donated,
    )
    (_, _, refused, _), (_, _, time, best) = tried
    assert "Error" in refused and time == 1.0 and best.v_block == 64


def test_the_table_has_times_notes_and_peers():
    facts = {"name": "a", "sizes": {"B": 1, "K": 2}, "floor_ms": 0.5, "flops": 1}
    measured = facts | {
        "implementation": "pallas",
        "ms": 1.0,
        "fraction_of_floor": 0.5,
        "gb_s": 2000.0,
        "tflop_s": 300.0,
        "error": 1e-3,
        "note": None,
    }
    refused = facts | {"implementation": "xla", "ms": None, "note": "out of memory"}
    table = script("kernels").markdown(
        [measured, refused], {"rows": {"a": {"ms": 2.0, "note": None}}}
    )
    assert table.splitlines()[-1] == (
        "| `a` | B1 K2 | 1.000 | 2.000 | out of memory | 0.500 | 50 % | 2000 | 300 | 1.0e-03 |"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing/x.json"], "does not exist"),
        (["x.json", "--rows", "nothing"], "no row is called 'nothing'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script("kernels").main()
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_the_drivers_script_runs_the_kernels_it_names(capsys):
    drivers = script("drivers")
    drivers.main([])
    out = capsys.readouterr().out
    assert out.startswith("drivers: skipped: driver='triton' cannot run here: kernels are not")
    assert out.count("\n") == 1
    with backend.compile_for("gpu"):
        arrays = jax.eval_shape(lambda: drivers.inputs(1, 128, 2, 96, 64))
        names = []
        for name, takes, run in drivers.calls("pallas", 96):
            names.append(name)
            assert jax.tree.leaves(jax.eval_shape(run, *arrays[takes]))
    assert len(set(names)) == 7


@pytest.mark.parametrize("wrong", (["--length", "100"], ["--value", "96"]))
def test_the_drivers_script_refuses_sizes_that_blocks_do_not_divide(capsys, wrong):
    with pytest.raises(SystemExit):
        script("drivers").main(wrong)
    assert "must be a multiple of 64" in capsys.readouterr().err
