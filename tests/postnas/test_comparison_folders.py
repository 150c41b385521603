"""What a comparison's folder holds against what is asked: checked before any compute."""

import dataclasses
import json

import jax
import nets
import pytest

from jet_jax.data import DataConfig
from jet_jax.distill import Teacher
from jet_jax.evaluation.rows import Passage, pack
from jet_jax.postnas.arms import block_arms
from jet_jax.postnas.comparison import check
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.comparison_context import ComparisonContext
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
