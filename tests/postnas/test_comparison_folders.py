"""What a comparison's folder holds against what is asked: checked before any compute."""

import dataclasses
import json

import jax
import nets
import pytest

from jet_jax.data import DataConfig
from jet_jax.distill import Teacher
from jet_jax.evaluation.rows import Passage, pack
from jet_jax.postnas.arm_runs import ArmRuns
from jet_jax.postnas.arms import block_arms
from jet_jax.postnas.comparison import check, judges_of
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
from jet_jax.postnas.comparison_folder import check_folder
from jet_jax.postnas.objectives import Objective
from jet_jax.sharding import make_mesh

SETTINGS = ComparisonConfig(
    block_arms(("retnet", "gla")), learning_rates=(1e-3, 4e-3), seeds=(0, 1), init="random",
    measure=None,
)  # fmt: skip


def objective(name: str, first: int, figure: str = "kl") -> Objective:
    passage = Passage([first, 2, 3]).ask([4])
    return Objective(name, pack([passage], 8, name=name), figure)


@pytest.fixture
def context(tmp_path) -> ComparisonContext:
    return ComparisonContext(
        teacher=Teacher.of(nets.teacher()),
        path=(1, 0, 1, 0),
        data=DataConfig(train=("text",), tokenizer="tokenizer", seq_len=8, batch_size=4),
        mesh=make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        objectives=(objective("text", 5), objective("recall", 6, "accuracy")),
        tuning=objective("text", 7),
    )


def finish(folder, arm, seed, rate, figures):
    """Leaves a run's result, as `ArmRuns.judge` does."""
    path = folder / arm / f"seed-{seed}-{rate}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"figures": figures, "note": None}))
    return path


def test_finished_runs_that_lack_an_objective_are_named(context, tmp_path):
    by_text = dataclasses.replace(SETTINGS, judged_by=("text",))
    check(by_text, tmp_path, context)
    lacking = [
        finish(tmp_path, "retnet", 0, 0.001, {"text": 1.0}),
        finish(tmp_path, "gla", 1, 0.004, {"text": 1.0}),
    ]
    finish(tmp_path, "retnet", 1, 0.001, None)  # diverged
    whole = finish(tmp_path, "gla", 0, 0.004, {"text": 1.0, "recall": 0.5})
    check(by_text, tmp_path, context)
    with pytest.raises(ValueError, match="have no figure of 'recall'") as caught:
        check(SETTINGS, tmp_path, context)
    told = str(caught.value)
    assert all(str(path) in told for path in lacking) and str(whole) not in told
    assert told.count(".json") == 2 and "delete these files" in told
    for path in lacking:
        path.unlink()
    check(SETTINGS, tmp_path, context)


def test_a_folder_belongs_to_one_text_and_one_way_of_tuning(context, tmp_path):
    arms = [ArmRuns(name, SETTINGS, context, tmp_path / name) for name in SETTINGS.arms]

    def checking(settings=SETTINGS, **changes):
        there = dataclasses.replace(context, **changes)
        check_folder(settings, there, arms, judges_of(settings, there), tmp_path)

    def refused(**changes):
        with pytest.raises(ValueError, match="holds another comparison") as caught:
            checking(**changes)
        return str(caught.value)

    checking()
    for name, value in {
        "train": ["other"], "tokenizer": "other", "seq_len": 4, "seed": 1, "text_key": "body",
        "doc_separator": "", "shuffle": False, "add_bos": True, "add_eos": False, "pack_rows": 8,
    }.items():  # fmt: skip
        data = dataclasses.replace(context.data, **{name: value})
        assert f"data.{name}: " in refused(data=data)
    assert "tuning.name: 'text' there, 'recall' here" in refused(tuning=objective("recall", 7))
    assert "tuning.figure: " in refused(tuning=objective("text", 7, "nll"))
    assert "tuning.rows: " in refused(tuning=objective("text", 8))
    assert "objectives.text.rows: " in refused(objectives=(objective("text", 8),))

    with pytest.raises(ValueError, match="settings.accumulation: 1 there, 2 here"):
        checking(dataclasses.replace(SETTINGS, accumulation=2))

    faster = dataclasses.replace(context.data, num_threads=0, prefetch=0)
    otherwise = dataclasses.replace(SETTINGS, remat="none", keep_weights=True)
    checking(otherwise, data=faster, objectives=context.objectives[:1])
    changed = (context.objectives[0], objective("recall", 8, "accuracy"))
    assert "objectives.recall.rows: " in refused(objectives=changed)
