"""What follows a placement: comparisons of layers, the hybrid of the best one, final training."""

import json
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest
from test_search_stages import DATA, compiled_once, mesh, settings, teacher  # noqa: F401

import jet_jax
from jet_jax import train_run
from jet_jax.params import flatten
from jet_jax.postnas.arm_runs import ArmRuns
from jet_jax.postnas.final_hybrid import chosen, converted
from jet_jax.postnas.json_files import write_json
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import STAGES, final_comparison
from jet_jax.postnas.stage_training import Stopped
from jet_jax.postnas.stages import is_asked, run

OPTIM = {"lr": 1e-3, "warmup_steps": 1}
COMPARISON = {
    "learning_rates": (1e-3,), "seeds": (0,), "align_steps": 1, "steps": 2, "init": "copy",
    "align_optim": OPTIM, "optim": OPTIM, "measure": None,
}  # fmt: skip
ARMS = {
    "gated": {"kind": "retnet"},
    "plain": {"kind": "retnet", "options": {"use_output_gate": False}},
}
TRAINING = {
    "steps": 2, "optim": OPTIM, "log_every": 1,
    "data": {"valid": (str(DATA / "valid.jsonl"),), "seq_len": 32, "batch_size": 8},
    "eval_batches": 1,
}  # fmt: skip


def config(teacher, **changes):  # noqa: F811
    good = settings(teacher)
    text = {"text": good.placement.objectives["text"]}
    values = {
        "align": {"steps": 0},
        "supernet": {"steps": 0},
        "linear": {"kind": "gla", "init": "copy"},
        "placement": {"objectives": text, "full": 1, "selector": "given", "layers": (2,)},
        "blocks": COMPARISON | {"arms": ARMS},
        "final": "blocks",
        "distill": TRAINING,
        "finetune": TRAINING | {"distill": {"mse": 0.0}},
    }
    return settings(teacher, **(values | changes))


def test_blocks_hybrid_and_final_training_follow_a_placement(teacher, mesh, tmp_path, capsys):  # noqa: F811
    search = Search(config(teacher), tmp_path, mesh)
    search.check()
    asked = [stage for stage in STAGES if is_asked(search.config, stage)]
    assert set(STAGES) - set(asked) == {"ablations", "shapes"}
    results = {stage: run(search, stage) for stage in asked}
    arms = results["blocks"]["arms"]
    means = {name: arm["figures"]["text"]["mean"] for name, arm in arms.items()}
    best = min(means, key=means.get)
    assert results["hybrid"]["layer_types"] == ["retnet", "retnet", "attn", "retnet"]
    tokens = search.config.data.batch_size * search.config.data.seq_len  # one step
    assert results["hybrid"]["new_layers"] == f"aligned on {tokens} tokens"
    assert results["distill"]["last"]["step"] == 2 and results["distill"]["last"]["kl"] > 0
    last = jet_jax.load(results["finetune"]["model"])
    assert list(last.config.layer_types) == results["hybrid"]["layer_types"]
    assert results["hybrid"]["chosen"] == best and len(results["hybrid"]["digest"]) == 16
    models = results["evaluate"]["models"]
    assert list(models) == ["teacher", "hybrid", "distill", "finetune"]
    assert results["evaluate"]["split"] == "test"
    kl = {name: model["figures"]["text"]["value"] for name, model in models.items()}
    assert abs(kl["teacher"]) < 1e-5 and all(kl[name] > 0 for name in models if name != "teacher")
    assert len(set(kl.values())) == 4  # each is another model
    assert f"\nfinetune: text kl {kl['finetune']:.4g}\n" in capsys.readouterr().out
    assert (tmp_path / "evaluation.md").read_text().count("\n| ") == 4
    page = (tmp_path / "report.html").read_text()
    for title in (
        "What came out",
        "Comparison of blocks",
        "Final training, first run",
        "KL to the teacher",
    ):
        assert title in page
    assert json.loads((tmp_path / "blocks.json").read_text())["reference"] == "gated"


def test_a_training_stopped_in_its_last_step_ends_the_search(teacher, mesh, tmp_path, monkeypatch):  # noqa: F811
    search = Search(config(teacher), tmp_path, mesh)
    write_json(tmp_path / "hybrid.json", {"model": str(teacher)})
    training = SimpleNamespace(mesh=mesh, stack=ExitStack(), stopped=True)
    monkeypatch.setattr(train_run, "prepare", lambda *args: training)
    monkeypatch.setattr(train_run, "loop", lambda run: True)  # its last step is done
    with pytest.raises(Stopped, match="distill"):
        run(search, "distill")
    assert not search.is_done("distill")


def test_a_layer_type_of_ones_own_choice_is_aligned(teacher, mesh, tmp_path):  # noqa: F811
    """As `align` says: its weights are no longer those that it starts with."""
    changes = {"blocks": None, "distill": None, "finetune": None, "final": "retnet"}
    optim = OPTIM | {"weight_decay": 0.0}
    search = Search(config(teacher, align={"steps": 1, "optim": optim}, **changes), tmp_path, mesh)
    search.check()
    write_json(tmp_path / "placement.json", {"path": [1, 1, 0, 1]})
    made, weights, tokens = converted(search)
    assert made.layer_types == ("retnet", "retnet", "attn", "retnet") and tokens > 0
    before = ArmRuns(
        "final", final_comparison(search.config), search.comparison(chosen(search)[1]), tmp_path
    ).start(search.config.seed)
    for i, moves in enumerate((True, True, False, True)):
        here, there = (flatten(w["layers"][i]["mixer"]) for w in (weights, before))
        assert any(not np.array_equal(here[k], there[k]) for k in here) == moves, i


def test_what_is_wrong_with_later_stages_is_told_first(teacher, mesh, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="final='shapes' takes what that comparison chose"):
        config(teacher, final="shapes")
    with pytest.raises(ValueError, match="final='gdm' is unknown"):
        config(teacher, final="gdm")
    with pytest.raises(ValueError, match="stepz"):
        config(teacher, distill=TRAINING | {"stepz": 3})
    with pytest.raises(ValueError, match="sequence_len"):
        config(teacher, distill=TRAINING | {"data": {"sequence_len": 3}})
    with pytest.raises(ValueError, match="blocks: layer type 'gdx' is unknown"):
        config(teacher, blocks=COMPARISON | {"arms": {"gdx": {"kind": "gdx"}}})
    arms = {"odd": {"kind": "gdn", "options": {"num_heads": 3}}}
    search = Search(config(teacher, blocks=COMPARISON | {"arms": arms}), tmp_path, mesh)
    with pytest.raises(ValueError, match="blocks: arm 'odd' cannot start with init='copy'"):
        search.check()
    text = TRAINING["data"] | {"valid": ("nowhere.jsonl",)}
    shapes = {f"{n}": {"kind": "gdn", "options": {"num_heads": n, "head_dim": 8}} for n in (1, 2)}
    sizes = COMPARISON | {"init": "random", "arms": shapes, "measure": {}}
    for changed, message in (
        ({"distill": TRAINING | {"data": text}}, "distill: .*nowhere"),
        ({"finetune": TRAINING | {"optim": OPTIM | {"freeze": ("mlpp",)}}}, "finetune: .*mlpp"),
        ({"shapes": sizes}, "shapes: .*at one cache size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Search(config(teacher, **changed), tmp_path, mesh).check()
    assert not (tmp_path / "search.json").exists()
    search = Search(config(teacher), tmp_path, mesh)
    with pytest.raises(ValueError, match="no result of the stage 'hybrid' yet"):
        run(search, "distill")
    assert not (tmp_path / "distill").exists()
    with pytest.raises(ValueError, match=r"no settings for the stage 'shapes'; add config\.shapes"):
        run(search, "shapes")
