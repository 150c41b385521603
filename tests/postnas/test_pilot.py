"""The pilot run: what is done stays done, and its arms are the project's own steps."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import tiny
from flax import nnx

import jet_jax
from benchmarks import pilot_smollm
from benchmarks.pilot import gates, tables
from benchmarks.pilot.arms import Arms
from benchmarks.pilot.ledger import Clock, Ledger, OutOfTime
from benchmarks.pilot.material import Material, Sizes
from benchmarks.pilot.steps import tunable
from benchmarks.pilot_smollm import Piece
from jet_jax.models.lm import HybridLM
from jet_jax.optim import OptimConfig
from jet_jax.postnas import training
from jet_jax.postnas.path_optim import make_path_optimizer
from jet_jax.sharding import make_mesh, put_batch

DATA = Path(__file__).resolve().parents[2] / "data" / "quickstart"
SETTINGS = {"scale": 1.0}
OPTIM = OptimConfig(lr=1.0, warmup_steps=2, weight_decay=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny teacher of random weights, and held-out documents."""
    folder = tmp_path_factory.mktemp("pilot")
    config = nets.teacher_config(vocab_size=2048, max_position_embeddings=128)
    jet_jax.save(
        HybridLM(config, rngs=nnx.Rngs(0)), folder / "model", tokenizer_dir=DATA / "tokenizer"
    )
    text = json.loads((DATA / "valid.jsonl").read_text().splitlines()[0])["text"]
    lines = (json.dumps({"text": text[i : i + 2000]}) for i in range(0, 12_000, 2000))
    (folder / "valid.jsonl").write_text("\n".join(lines))
    return folder


def test_a_piece_that_is_done_is_not_done_again(tmp_path):
    calls = []

    def piece(name, result):
        return Piece(name, lambda: calls.append(name) or result)

    def late():
        raise OutOfTime

    path = tmp_path / "pilot.json"
    wanted = [piece("a", {"x": 1}), Piece("b", late), piece("c", {"x": 3})]
    ledger = Ledger(path, SETTINGS)
    ledger.begin({"device": "one"})
    assert not pilot_smollm.run(wanted, ledger, Clock(None)) and calls == ["a"]
    again = Ledger(path, SETTINGS)
    again.begin({"device": "two"})
    wanted[1] = piece("b", {"x": 2})
    assert pilot_smollm.run(wanted, again, Clock(None)) and calls == ["a", "b", "c"]
    assert [(again[n]["x"], again[n]["run"]) for n in "abc"] == [(1, 0), (2, 1), (3, 1)]
    with pytest.raises(ValueError, match="holds another pilot"):
        Ledger(path, {"scale": 0.5})


def test_no_piece_begins_that_may_not_end_in_time(tmp_path):
    clock = Clock(1.0)
    clock.longest = 59.0
    ledger = Ledger(tmp_path / "pilot.json", SETTINGS)
    assert not pilot_smollm.run([Piece("a", dict)], ledger, clock)
    assert "a" not in ledger


def test_an_arms_step_is_the_step_of_that_learning_rate():
    peak = 4e-3
    net, mesh = nets.supernet(), make_mesh(devices=jax.devices()[:1])

    def make(optimizer, state):
        return training.make_align_step(net, optimizer, state, mesh)

    def trained(step):
        params = jax.tree.map(jnp.array, nets.params())  # steps give their state away
        optimizer = make_path_optimizer(OPTIM, 8, {"linear": params["linear"]}, {})
        state = training.init_state(params, optimizer)
        with jax.set_mesh(mesh):
            for i in range(3):
                batch = put_batch(tiny.random_batch(i, 4, 16, vocab=61), mesh)
                state, metrics = step(state, batch)
        return jax.device_get((state.params, metrics["lr"]))

    shared = tunable(make, OPTIM, 8)
    params, lr = trained(lambda s, b: shared(s, b, jnp.float32(peak), jnp.int32(7)))
    linear = {"linear": nets.params()["linear"]}
    own = make_path_optimizer(dataclasses.replace(OPTIM, lr=peak), 8, linear, {})
    state = jax.eval_shape(lambda: training.init_state(nets.params(), own))
    expected, own_lr = trained(make(own, state))
    assert lr == pytest.approx(own_lr, rel=1e-6)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_arm_trains_and_is_scored(files, tmp_path):
    sizes = Sizes((2, 32), (2, 32), 3, 2, (96,), 2, 8)
    mesh = make_mesh(devices=jax.devices()[:1])
    material = Material(
        str(files / "model"), (str(DATA / "train.jsonl"),), (str(files / "valid.jsonl"),), sizes,
        mesh, Clock(None), None, 0,
    )  # fmt: skip
    ledger = Ledger(tmp_path / "pilot.json", SETTINGS)
    ledger.begin({"device": "cpu"})
    with jax.set_mesh(mesh):
        result = Arms(material, partial(gates.retrieval_rows, material, ledger)).paths(5e-4, 1)
    assert result["tokens"] == 3 * 2 * 32 and len(result["losses"]) == 3
    scores = result["scores"]
    assert abs(scores["teacher"]["kl"]["all"]) < 1e-6 and scores["all linear"]["kl"]["all"] > 0.01
    assert set(scores["all linear"]["accuracy"]) == {"mqar", "extraction"}
    ledger.put("paths/0.0005/1", result)
    ledger.put("paths/0.0005/2", result)
    page = tables.page(ledger)
    kl = scores["all linear"]["kl"]["all"]
    assert "2 seeds" in page and f"{kl:.4g} ± 0 " in page


def test_the_teachers_gates_from_the_command_line(files, tmp_path, capsys, monkeypatch):
    some = {task: gates.TASKS[task] for task in ("mqar", "cloze")}
    monkeypatch.setattr(gates, "TASKS", some)
    command = [
        "--teacher", str(files / "model"), "--train", str(DATA / "train.jsonl"),
        "--valid", str(files / "valid.jsonl"), "--out", str(tmp_path), "--only", "gates",
        "--scale", "0.01", "--threads", "0",
    ]  # fmt: skip
    pilot_smollm.main(command)
    pieces = json.loads((tmp_path / "pilot.json").read_text())["pieces"]
    assert len(pieces["gates/mqar/96"]["settings"]) == 4
    nll = pieces["gates/by position"]["buckets"]["all"]["nll"]
    assert nll > 4  # a teacher that has learnt nothing
    page = (tmp_path / "pilot.md").read_text()
    assert f"| {nll:.3f} |" in page and page in capsys.readouterr().out
    with pytest.raises(SystemExit, match="holds another pilot"):
        pilot_smollm.main([*command, "--dtype", "bfloat16"])
