"""`jet-jax bench blocks` on a CPU, and what it counts."""

import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import pytest

from jet_jax.bench import block_rows, block_runs, block_tables, blocks, timing
from jet_jax.cli import main
from kernels_pallas import backend

REAL = {block.name: block for block in blocks.all_blocks()}
SMALL = {block.name: block for block in blocks.all_blocks(small=True)}


def num_bytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_a_block_is_measured_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "measure_ceilings", lambda **_: timing.Ceilings(10.0, 0.1))
    path = tmp_path / "out.json"
    words = ["bench", "blocks", "--blocks", "retnet", "--quick", "--repeats=1", f"--json={path}"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("retnet", "tokens/s", "4×24×48", "median"))
    report = json.loads(path.read_text())
    assert report["copy_gb_s"] == 10 and report["blocks"][0]["state_elements"] == 4 * 24 * 48
    layer, step = report["rows"]
    assert (layer["block"], layer["name"]) == ("retnet", "retnet-b2-t64-grad")
    assert layer["tokens_s"] == pytest.approx(1e3 * 2 * 64 / layer["ms"])
    assert layer["kernels"] == []  # plain XLA here
    assert layer["implementation"] == step["implementation"] == "xla" and "tokens_s" not in step
    for row in (layer, step):
        assert row["note"] is None and row["ms"] > 0 and 1e-4 < row["error"] < 2e-2  # bfloat16
        assert row["fraction_of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_states_are_equal_and_sizes_those_of_the_search():
    assert {block.state_elements for block in REAL.values()} == {294_912}
    assert {block.state_elements for block in SMALL.values()} == {294_912 // 64}
    shapes = {name: block.state_shape for name, block in REAL.items()}
    assert shapes == {
        **dict.fromkeys(("retnet", "gla", "deltanet", "gdn"), (4, 192, 384)),
        "mamba2": (48, 96, 64),
        "jet": (12, 96, 256),
        "kda": (18, 128, 128),
        "rwkv7": (8, 192, 192),
    }
    paper = {name: block.facts()["paper_ratio"] for name, block in REAL.items()}
    assert {name: ratio and round(ratio, 2) for name, ratio in paper.items()} == {
        "retnet": 1.09,
        "gla": 1.07,
        "mamba2": 1.11,
        "deltanet": 1.03,
        "gdn": 1.0,
        "jet": 0.94,
        "kda": None,
        "rwkv7": 0.5,
    }


def test_products_of_a_chunk_are_those_of_the_kernels_benchmark():
    from jet_jax.bench import rows

    sizes = {"B": 1, "T": 1, "H": 12, "K": 96, "V": 256}
    assert 2 * REAL["jet"].recurrence_products() == rows.Rule("rule", sizes).flops()
    # Without errors to correct: q k^T and its product with v; the state read and written.
    one = 64 * 192 + 64 * 384 + 2 * 192 * 384
    assert REAL["gla"].recurrence_products() == 4 * one


@pytest.mark.parametrize("name", REAL)
def test_weights_are_counted_and_none_is_zero(name):
    shapes = jax.eval_shape(REAL[name].weights, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == REAL[name].param_count
    assert {str(x.dtype) for x in jax.tree.leaves(shapes)} <= {"bfloat16", "float32"}


def test_matrices_that_start_at_zero_are_filled():
    filled = blocks._without_zeros(jnp.zeros((3, 4), jnp.bfloat16))
    assert jnp.count_nonzero(filled) >= 11 and filled.dtype == jnp.bfloat16
    kept = jnp.array([[0.0, 2.0]])
    assert (blocks._without_zeros(kept) == kept).all()
    assert (blocks._without_zeros(jnp.zeros(3)) == 0).all()  # vectors are left alone


@pytest.mark.parametrize("name", REAL)
def test_bytes_count_inputs_and_outputs_once(name):
    token = block_rows.step_row(REAL[name], small=False)
    one = block_rows.OneToken(token.name, token.sizes, token.block)
    inputs = jax.eval_shape(one.inputs, jax.random.key(0))
    outputs = jax.eval_shape(one.function("xla"), *inputs)
    assert num_bytes((inputs, outputs)) == token.num_bytes()
    assert outputs[-1].shape == inputs[0].shape == (128, *REAL[name].state_shape)
    assert token.donated == (0,) and token.steps == 20

    forward, both = (
        dataclasses.replace(row, sizes={"B": 2, "T": 16})
        for row in block_rows.layer_rows(SMALL[name], small=False, quick=False)[:2]
    )
    inputs = jax.eval_shape(both.inputs, jax.random.key(0))
    y, weights, *rows = jax.eval_shape(both.function("any"), *inputs)
    assert y.shape == (2, 16, 192) == rows[0].shape
    assert [x.shape for x in jax.tree.leaves(weights)] == [
        x.shape for x in inputs[: -1 - len(rows)]
    ]
    # Vectors that stay float32 and what is shared between layers are too little to matter.
    moved = num_bytes((inputs[:-1], y))
    assert forward.num_bytes() == pytest.approx(moved - num_bytes(rows[1:]), rel=1e-2)
    again = num_bytes((inputs[: -1 - len(rows)], weights)) + 3 * num_bytes(y)
    assert both.num_bytes() == pytest.approx(forward.num_bytes() + again, rel=1e-2)


def test_rwkv7_removes_a_part_along_one_direction():
    row = block_rows.step_row(SMALL["rwkv7"], small=True)
    token = dict(zip(row.block.token(), row.inputs(jax.random.key(0))[1:], strict=True))
    lengths = jnp.linalg.norm(token["a"].astype(jnp.float32), axis=-1)
    assert jnp.allclose(lengths, 1, atol=1e-2)
    share = -token["b"].astype(jnp.float32) / token["a"].astype(jnp.float32)
    assert (share > 0).all() and (share < 1.01).all()


def test_kernels_of_a_layer_are_named():
    row = block_rows.layer_rows(REAL["retnet"], small=False, quick=True)[0]
    row = dataclasses.replace(row, sizes={"B": 1, "T": 128})
    assert block_runs.kernel_names(row, "xla") == []
    with backend.compile_for("gpu"):
        names = block_runs.kernel_names(row, "pallas")
    assert names and any("gradients" in name for name in names)
    broken = dataclasses.replace(row, block=dataclasses.replace(row.block, options={"heads": 1}))
    assert block_runs.kernel_names(broken, "xla") is None


def result(block, ms, tokens=1024, **more):
    return {
        "op": "layer",
        "name": f"{block}-b1-t{tokens}-grad",
        "block": block,
        "sizes": {"B": 1, "T": tokens},
        "implementation": "pallas",
        "ms": ms,
        "tokens_s": None if ms is None else 1e3 * tokens / ms,
        "fraction_of_floor": 0.5,
        "error": 1e-3,
        "note": "out of memory" if ms is None else None,
        **more,
    }


def test_ratios_compare_the_fastest_at_equal_sizes():
    results = [
        result("gdn", 2.0),
        result("gla", 1.0),
        result("gla", 4.0, implementation="xla"),
        result("gla", 3.0, 2048),
        result("jet", None),
    ]
    assert block_runs.ratios(results) == {"gdn, B1 T1024": 1.0, "gla, B1 T1024": 2.0}
    assert block_runs.ratios(results[1:]) == {}


def test_the_table_has_times_ratios_and_notes():
    from rich.console import Console

    console = Console(width=140, file=io.StringIO(), record=True)
    results = [
        result("gdn", 2.0),
        result("gla", 1.0, name="gla-b1-t1024", note=None),
        result("gla", 1.25),
        result("gla", 4.0, implementation="xla"),
        result("rwkv7", None),
    ]
    console.print(block_tables.layers_table("title", list(REAL.values()), results))
    cells = [line.split() for line in console.export_text().splitlines() if "B1" in line]
    assert cells == [
        "gdn B1 T1024 pallas 512,000 1.00 1.00 2.000 50 % 1.0e-03".split(),
        "gla B1 T1024 pallas 819,200 1.60 1.07 1.250 50 % 1.000 1.0e-03".split(),
        "B1 T1024 xla 256,000 4.000 50 % 1.0e-03".split(),
        "rwkv7 B1 T1024 pallas 0.50 out of memory".split(),
    ]


def test_the_list_names_every_block(capsys):
    assert main(["bench", "blocks", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in REAL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "gdn", "attn"], "no block is called 'attn'; there are retnet, gla,"),
        (["--repeats=0"], "--repeats 0 must be at least 1"),
        (["--json", "missing/out.json"], "lies in a directory that does not exist"),
    ],
)
def test_mistakes_are_told(arguments, message, capsys):
    assert main(["bench", "blocks", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_one_program_checks_a_layers_rows():
    forward, both = block_rows.layer_rows(SMALL["gdn"], small=True, quick=False)
    assert (forward.what, both.what) == ("gdn, forward", "gdn, forward + backward")
    small = dataclasses.replace(forward.small(), name=both.name)
    assert small == both.small() and small.backward and not small.weights
    assert forward.input_key == both.input_key != small.input_key
    real = block_rows.layer_rows(REAL["gdn"], small=False, quick=False)
    assert {tuple(row.small().sizes.items()) for row in real} == {(("B", 1), ("T", 512))}
