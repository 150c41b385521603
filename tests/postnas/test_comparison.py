"""A comparison of blocks on a tiny teacher: runs, pairing, going on after a stop, tables."""

import dataclasses
import json
from pathlib import Path

import jax
import nets
import numpy as np
import pytest
from flax import nnx

from jet_jax.data import DataConfig, load_tokenizer
from jet_jax.distill import Teacher
from jet_jax.evaluation.tasks import Settings, find
from jet_jax.metrics import read_records
from jet_jax.models.lm import HybridLM
from jet_jax.params import flatten
from jet_jax.postnas import arm_runs
from jet_jax.postnas.arm_runs import ArmRuns
from jet_jax.postnas.arms import arm_options, block_arms, hybrid_config, shape_arms
from jet_jax.postnas.comparison import check, choose_rate, compare
from jet_jax.postnas.comparison_config import ArmConfig, ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.comparison_report import html
from jet_jax.postnas.objectives import Objective
from jet_jax.postnas.shape_comparison import compare_shapes
from jet_jax.sharding import make_mesh

DATA = Path(__file__).resolve().parents[2] / "data" / "quickstart"
ARMS = block_arms(("retnet", "rwkv7")) | {"window": {"kind": "swa", "options": {"window_size": 4}}}
MEASURE = {"context": 32, "batch": 1, "prefill_length": 32, "chunk": 32, "repeats": 1}


def settings(**changes) -> ComparisonConfig:
    values = {
        "arms": ARMS,
        "learning_rates": (1e-3, 4e-3),
        "seeds": (0, 1),
        "refit_batches": 2,
        "align_steps": 4,
        "align_optim": {"lr": 3e-4, "weight_decay": 0.0},
        "tuning_steps": 2,
        "steps": 4,
        "optim": {"warmup_steps": 1, "weight_decay": 0.0},
        "measure": None,
    }
    return ComparisonConfig.from_dict(values | changes)


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Comparisons of this file share their compiled programs."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def context():
    config = nets.teacher_config(vocab_size=2048, layer_types=("attn",) * 2)
    tokenizer = load_tokenizer(str(DATA / "tokenizer"), 2048)
    text = json.loads((DATA / "valid.jsonl").read_text().splitlines()[0])["text"]
    documents = tuple(text[i : i + 200] for i in range(0, 4000, 200))

    def objective(name, task, figure, split):
        wanted = Settings(length=32 if documents else 64, items=8, split=split, documents=documents)
        return Objective(name, find([task])[task].rows(tokenizer, wanted), figure)

    return ComparisonContext(
        teacher=Teacher.of(HybridLM(config, rngs=nnx.Rngs(0))),
        path=(1, 1),
        data=DataConfig(
            train=(str(DATA / "train.jsonl"),), tokenizer=str(DATA / "tokenizer"), seq_len=32,
            batch_size=4, num_threads=0, pack_rows=16, prefetch=0,
        ),
        mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        objectives=(objective("text", "perplexity", "kl", "search"),),
        tuning=objective("text", "perplexity", "kl", "tuning"),
        batch_size=4, log_every=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def done(context, tmp_path_factory):
    """A comparison that has run to its end."""
    folder = tmp_path_factory.mktemp("blocks")
    return folder, compare(settings(), folder, context)


def losses(folder):
    return {r["step"]: r["loss"] for r in read_records(folder, "train")}


@pytest.mark.slow  # with what it sets up
def test_every_arm_is_trained_judged_and_described(done, context):
    folder, summary = done
    assert list(summary["arms"]) == ["retnet", "rwkv7", "window"]
    assert summary == json.loads((folder / "results.json").read_text())
    assert summary["teacher"]["text"] == pytest.approx(0, abs=1e-6)
    assert summary["tokens"] == {"align": 512, "steps": 512, "tuning": 256}
    for name, arm in summary["arms"].items():
        config = hybrid_config(context.teacher.config, context.path, name, settings().arms[name])
        assert config.layer_types == (arm["kind"],) * 2
        assert arm["parameters"] == config.param_count()
        assert arm["state_elements"] == (None if name == "window" else 4 * 8 * 8)
        assert arm["cache_bytes"] == config.cache_bytes(config.max_position_embeddings)
        assert arm["train_tokens_s"] > 0 and arm["note"] is None
        best = min(arm["tuned"], key=arm["tuned"].get)
        assert float(best) == arm["learning_rate"] and arm["at_end"]
        runs = arm["seeds"]
        values = [runs[seed]["figures"]["text"] for seed in ("0", "1")]
        assert 0 < values[0] != values[1] > 0
        figure = arm["figures"]["text"]
        assert figure["mean"] == pytest.approx(np.mean(values))


def test_alignment_trains_the_new_mixers_alone(context, tmp_path):
    aligned = flatten(ArmRuns("window", settings(), context, tmp_path).aligned(0))
    teacher = flatten(context.teacher.params)
    moved = {name for name in teacher if not np.array_equal(teacher[name], aligned[name])}
    assert moved == {name for name in teacher if ".mixer." in name}


def test_differences_are_paired_by_seed(done):
    _, summary = done
    rwkv7, retnet = (
        np.array([run["figures"]["text"] for run in summary["arms"][name]["seeds"].values()])
        for name in ("rwkv7", "retnet")
    )
    found = summary["arms"]["rwkv7"]["figures"]["text"]["difference"]
    assert found["mean"] == pytest.approx((rwkv7 - retnet).mean())
    half = (
        12.706 * (rwkv7 - retnet).std(ddof=1) / np.sqrt(2)
    )  # Student's t with one degree of freedom
    assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-3)
    assert summary["arms"]["retnet"]["figures"]["text"]["difference"] is None


def test_tables_and_figures_are_written(done):
    folder, _ = done
    table = (folder / "table.md").read_text()
    assert table.count("\n| ") == 3 and "less retnet (95 %)" in table and "2 seeds" in table
    assert (folder / "bars.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png" in "".join(html(folder))
    assert not list(folder.glob("*/*/checkpoints"))  # results need them no more


def test_a_seed_fixes_data_and_new_weights_for_all_arms(context, tmp_path):
    runs = {
        name: ArmRuns(name, settings(init="random"), context, tmp_path / name)
        for name in ("retnet", "window")
    }

    def first(name, seed, sort=arm_runs.RUN):
        iterator = runs[name]._data(seed, sort)
        tokens = next(iterator)["tokens"]
        iterator.close()
        return tokens

    assert np.array_equal(first("window", 0), first("retnet", 0))
    assert not np.array_equal(first("window", 0), first("window", 1))
    assert not np.array_equal(first("window", 0), first("window", 0, arm_runs.TUNE))
    one, again, other = (
        flatten(runs["retnet"].start(seed)["layers"][1]["mixer"]) for seed in (0, 0, 1)
    )
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["q_proj.kernel"], other["q_proj.kernel"])


def test_a_comparison_that_was_killed_goes_on_with_the_same_numbers(done, context, tmp_path):
    """Killed in the middle of the alignment, then in a run that counts."""
    folder, summary = done

    class Killed(Exception):
        pass

    made = arm_runs.make_loss_step

    def dying_after(count):
        def make(*args, **kwargs):
            step = made(*args, **kwargs)

            def one(*args):
                nonlocal count
                count -= 1
                if count < 0:
                    raise Killed
                return step(*args)

            return one

        return make

    context = dataclasses.replace(context, checkpoint_every=2)
    only = settings(arms={"window": ARMS["window"]}, reference="window")
    for count in (3, 2 + 4 + 3):  # steps 3 of the alignment; 3 of the first run that counts
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(arm_runs, "make_loss_step", dying_after(count))
            with pytest.raises(Killed):
                compare(only, tmp_path, context)
    assert (tmp_path / "window" / "tune-0.004.json").is_file()
    assert not list((tmp_path / "window").glob("seed-*.json"))
    found = compare(only, tmp_path, context)["arms"]["window"]
    wanted = summary["arms"]["window"]
    assert found["tuned"] == wanted["tuned"]
    for seed in ("0", "1"):
        assert found["seeds"][seed]["figures"] == wanted["seeds"][seed]["figures"]
    rate = f"{found['learning_rate']:g}"
    for run in ("align-0", f"seed-0-{rate}"):
        mine, theirs = (losses(place / "window" / run) for place in (tmp_path, folder))
        assert mine == theirs


def test_what_is_finished_is_not_run_again(done, context, monkeypatch):
    folder, summary = done

    def refuse(*args, **kwargs):
        raise AssertionError("ran again")

    monkeypatch.setattr(ArmRuns, "_train", refuse)
    assert compare(settings(), folder, context) == summary
    with pytest.raises(ValueError, match="holds another comparison:\n  settings.steps: 4 there, 6"):
        compare(settings(steps=6), folder, context)
    elsewhere = dataclasses.replace(context, path=(0, 1))
    with pytest.raises(ValueError, match="path: .1, 1. there, .0, 1. here"):
        compare(settings(), folder, elsewhere)


@pytest.mark.slow
def test_shapes_are_compared_and_chosen(context, tmp_path):
    """Random starts, since heads of other widths cannot be copied; one seed, speeds measured."""
    arms = shape_arms("gdn", 256, shapes=("8-8-4", "16-8-2"))
    measured = settings(
        arms=arms, learning_rates=(1e-3,), seeds=(0,), init="random", align_steps=0, steps=2,
        measure=MEASURE,
    )  # fmt: skip
    measured_context = dataclasses.replace(context, measurements=tmp_path / "speeds")
    found = compare_shapes(measured, tmp_path / "shapes", measured_context, tolerance=0.01)
    arms = found["comparison"]["arms"]
    kl = {name: arm["figures"]["text"]["mean"] for name, arm in arms.items()}
    assert found["shape"] == min(kl, key=kl.get) == found["by_objective"]["text"]
    assert found["options"]["head_dim"] == int(found["shape"].split("-")[0])
    assert all(arm["decode_tokens_s"] > 0 and arm["prefill_tokens_s"] > 0 for arm in arms.values())
    assert arms["8-8-4"]["cache_bytes"] > 0
    assert len(list((tmp_path / "speeds").glob("*.json"))) == 2
    assert (tmp_path / "shapes" / "shapes.png").stat().st_size > 1000
    assert f"Chosen: {found['shape']}" in (tmp_path / "shapes" / "choice.md").read_text()


def test_what_is_wrong_is_told_before_any_compute(context, tmp_path):
    def error(function, *args, **changes):
        with pytest.raises(ValueError) as caught:
            function(*args, **changes)
        return str(caught.value)

    def checking(where=context, **changes):
        return error(lambda: check(settings(**changes), tmp_path / "new", where))

    assert "reference='x' is no arm" in error(settings, reference="x")
    assert "'gdm' is unknown" in error(settings, arms=block_arms(("gdm",)))
    assert "did you mean 'seeds'" in error(settings, seed=(1,))
    assert "each once" in error(settings, seeds=(1, 1))
    assert "do not fit in steps=1" in error(settings, steps=1, optim={"warmup_steps": 2})
    assert "set trains instead" in error(settings, optim={"freeze": ("mlp",)})
    assert "names a folder" in error(settings, arms={"a/b": {"kind": "gla"}}, reference="a/b")
    assert "'x' is no objective" in checking(judged_by=("x",))
    assert "unknown key 'taps' in arm 'a'" in checking(
        arms={"a": {"kind": "gla", "options": {"taps": 3}}}, reference="a"
    )
    assert "init='random' serves all arms" in checking(
        arms=shape_arms("gdn", 256, shapes=("16-8-2",)), reference="16-8-2"
    )
    assert "matches no weight" in checking(trains=("^layers.9.",))
    assert "has 2 layers" in checking(dataclasses.replace(context, path=(0, 1, 1)))
    assert "nothing to compare" in checking(dataclasses.replace(context, path=(0, 0)))
    assert "give the window's tokens" in checking(dataclasses.replace(context, path=(2, 1)))
    assert "measure must not be None" in error(compare_shapes, settings(), tmp_path, context)
    assert not (tmp_path / "new").exists()


def test_learning_rates_are_chosen_by_the_tuning_objective(context):
    kl = context.tuning
    assert choose_rate({1e-3: 0.5, 2e-3: 0.2, 4e-3: 0.3}, kl) == (2e-3, False)
    assert choose_rate({1e-3: 0.5, 2e-3: None, 4e-3: float("nan")}, kl) == (1e-3, True)
    assert choose_rate({1e-3: None}, kl) == (None, False)


def test_options_match_the_attention_but_for_the_arms_changes(context):
    teacher = context.teacher.config
    options = arm_options(teacher, "a", ArmConfig("gdn", {"conv_size": 2}))
    assert (options.num_heads, options.head_dim, options.conv_size) == (4, 8, 2)
    with_window = hybrid_config(teacher, (2, 1), "a", ArmConfig("gla"), 5)
    assert with_window.layer_types == ("swa", "gla")
    assert with_window.options("swa").window_size == 5
