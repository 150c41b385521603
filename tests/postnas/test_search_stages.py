"""A whole search on a tiny random teacher: every stage, its files, and going on after a stop."""

import json
import shutil
import signal
from contextlib import redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from flax import nnx

import jet_jax
from jet_jax import progress
from jet_jax.models.lm import HybridLM
from jet_jax.postnas import stages
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import SearchConfig
from jet_jax.postnas.stage_training import Stopped
from jet_jax.postnas.stages import check_gates, run
from jet_jax.sharding import make_mesh

ASKED = ("align", "supernet", "placement", "hybrid", "report")
DATA = Path(__file__).resolve().parents[2] / "data" / "quickstart"


def settings(teacher, **changes):
    optim = {"lr": 3e-3, "warmup_steps": 2}
    values = {
        "teacher": str(teacher),
        "data": {
            "train": (str(DATA / "train.jsonl"),),
            "tokenizer": str(DATA / "tokenizer"),
            "seq_len": 32,
            "batch_size": 8,
        },
        "linear": {"kind": "gla", "refit_batches": 2},
        "align": {"steps": 6, "optim": optim},
        "supernet": {"steps": 6, "optim": optim, "law": {"max_full": 2}},
        "placement": {
            "objectives": {
                "recall": {"task": "mqar", "figure": "loss", "length": 64, "num_items": 8},
                "text": {
                    "task": "perplexity", "figure": "kl", "length": 64,
                    "documents": (str(Path(teacher).parent / "held_out.jsonl"),),
                },
            },
            "full": 2, "full_by": "text", "windows": 1, "window_by": "text", "window": 8,
            "curve": (1, 2),
        },
        "log_every": 2,
        "checkpoint_every": 2,
        "compile_cache": "",
    }  # fmt: skip
    return SearchConfig.from_dict(values | changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "model"
    config = nets.teacher_config(vocab_size=2048, max_position_embeddings=128)
    text = json.loads((DATA / "valid.jsonl").read_text().splitlines()[0])["text"]
    lines = (json.dumps({"text": text[i : i + 200]}) for i in range(0, 4000, 200))
    (path.parent / "held_out.jsonl").write_text("\n".join(lines))
    jet_jax.save(HybridLM(config, rngs=nnx.Rngs(0)), path, tokenizer_dir=DATA / "tokenizer")
    return path


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Searches of this file share their compiled programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 1, 1, devices=jax.devices()[:2])


@pytest.fixture(scope="module")
def done(teacher, mesh, tmp_path_factory):
    """A search that has run all stages."""
    search = Search(settings(teacher), tmp_path_factory.mktemp("search"), mesh)
    search.check()
    with (search.workdir / "said.txt").open("w") as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "SAY_EVERY", 0.0)
        with redirect_stdout(said):
            results = {stage: run(search, stage) for stage in ASKED}
    return search, results


def test_all_stages_leave_their_results(done):
    search, results = done
    assert all(search.is_done(stage) for stage in ASKED)
    assert results["align"]["tokens"] == 6 * 8 * 32
    decision = results["placement"]
    assert decision == json.loads((search.workdir / "placement.json").read_text())
    assert len(decision["full"]["layers"]) == 2 and len(decision["windows"]["layers"]) == 1
    assert sorted(decision["layer_types"]) == ["attn", "attn", "gla", "swa"]
    assert len(decision["heat_map"]["text"]) == 4
    assert [row["count"] for row in decision["curve"]] == [1, 2]
    table = json.loads((search.workdir / "placement" / "table.json").read_text())
    kl = {tuple(row["path"]): row["text"] for row in table}
    assert kl[(0, 0, 0, 0)] == pytest.approx(0, abs=1e-5)  # the teacher
    pairs = {p: x for p, x in kl.items() if sorted(p) == [0, 0, 1, 1]}
    assert len(pairs) == 6
    best = min(pairs, key=pairs.get)
    assert [i for i in range(4) if best[i] == 0] == decision["full"]["layers"]
    for name in ("placement/heat_map.png", "placement/curve.png", "placement/table.md"):
        assert (search.workdir / name).stat().st_size > 100
    page = (search.workdir / "report.html").read_text()
    assert "data:image/png;base64" in page and "heat_map" in page and "<script" not in page


def test_the_saved_hybrid_is_the_path_that_was_scored(done):
    search, results = done
    model = jet_jax.load(results["hybrid"]["model"], dtype="float32")
    assert list(model.config.layer_types) == results["placement"]["layer_types"]
    params = {**search.trained("supernet", "align"), "teacher": search.teacher_weights}
    tokens = jnp.arange(48, dtype=jnp.int32).reshape(2, 24)
    with jax.set_mesh(search.mesh):
        hidden, _ = jax.jit(search.net.run)(
            params, np.array(results["placement"]["path"], np.int32), tokens
        )
    hidden, expected = map(np.asarray, (hidden, model.forward(tokens, logits_at="none").hidden))
    assert np.linalg.norm(hidden - expected) <= 1e-5 * np.linalg.norm(expected)


def test_a_killed_stage_goes_on_with_the_same_losses(done, teacher, mesh, tmp_path):
    """Killed after its second checkpoint, as if the process had died at step 5."""
    search, _ = done
    other = Search(settings(teacher), tmp_path, mesh)
    other.check()

    class Killed(Exception):
        pass

    made = stages.training.make_align_step

    def dying(*args, **options):
        step, calls = made(*args, **options), []

        def one(state, batch):
            calls.append(1)
            if len(calls) == 5:
                raise Killed
            return step(state, batch)

        return one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.training, "make_align_step", dying)
        with pytest.raises(Killed):
            run(other, "align")
    assert not other.is_done("align")
    scores = other.workdir / "placement" / "scores.jsonl"
    scores.parent.mkdir()
    scores.write_text("[]")
    run(other, "align")
    assert not scores.exists()  # they were of other weights

    def losses(workdir):
        lines = (workdir / "align" / "metrics.jsonl").read_text().splitlines()
        return {r["step"]: r["loss"] for r in map(json.loads, lines)}

    mine, theirs = losses(other.workdir), losses(search.workdir)
    assert mine[6] == theirs[6] and set(theirs) <= set(mine)


def test_placement_tells_how_far_it_is(done):
    said = (done[0].workdir / "said.txt").read_text()
    assert "scoring paths 4/4  0:00 left" in said  # the heat map


@pytest.mark.parametrize("late", [False, True])
def test_a_stop_in_a_stages_last_step_ends_the_search(teacher, mesh, tmp_path, late):
    """Asked for within the step, or when its results are waited for; the step is saved."""
    search = Search(settings(teacher), tmp_path, mesh)
    make, write = stages.training.make_align_step, stages.metrics.MetricWriter.write

    def stopping(*args, **options):
        step = make(*args, **options)

        def one(state, batch):
            if state.step == 5 and not late:
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch)

        return one

    def writing(writer, n, *args):
        if n == 6 and late:
            signal.raise_signal(signal.SIGTERM)
        write(writer, n, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.training, "make_align_step", stopping)
        patch.setattr(stages.metrics.MetricWriter, "write", writing)
        with pytest.raises(Stopped, match="saved step 6 of 6"):
            run(search, "align")
    assert not search.is_done("align")
    before = (tmp_path / "align" / "metrics.jsonl").read_text()
    assert run(search, "align")["steps"] == 6  # passes straight through
    assert (tmp_path / "align" / "metrics.jsonl").read_text() == before


def test_a_stage_does_not_go_on_from_what_grew_from_another(done, teacher, mesh, tmp_path):
    search, _ = done
    workdir = tmp_path / "copy"
    shutil.copytree(search.workdir, workdir)
    other = Search(settings(teacher), workdir, mesh)
    run(other, "supernet")  # nothing has changed
    result = json.loads((workdir / "align.json").read_text())
    (workdir / "align.json").write_text(json.dumps(result | {"tokens": 1}))
    with pytest.raises(ValueError, match=r"grew from other results of align; .* delete .*supernet"):
        run(other, "supernet")
    assert other.is_done("supernet")  # told before anything was taken away


def test_what_is_wrong_is_told_before_any_compute(teacher, mesh, tmp_path):
    def error(**changes):
        config = settings(teacher, **changes)
        with pytest.raises(ValueError) as caught:
            Search(config, tmp_path / "new", mesh).check()
        return str(caught.value)

    good = settings(teacher).placement
    objectives = good.objectives
    two = {"objectives": objectives, "full_by": "text"}
    assert "has 4" in error(placement=two | {"full": 5})
    assert "layer 7 does not exist" in error(placement=two | {"selector": "given", "layers": (7,)})
    assert "unknown task 'mqr'" in error(placement={"objectives": {"x": {"task": "mqr"}}})
    assert "placement.window" in error(placement=two | {"windows": 1, "window_by": "text"})
    assert "rwkv7 is no linear path" in error(linear={"kind": "rwkv7"})
    with pytest.raises(ValueError, match="is no objective"):
        settings(teacher, placement={"objectives": objectives, "full_by": "other"})
    with pytest.raises(ValueError, match="run it with --stage=placement"):
        run(Search(settings(teacher), tmp_path, mesh), "hybrid")
    assert not (tmp_path / "new").exists()


def test_a_teacher_that_cannot_do_the_task_ends_the_search(teacher, mesh, tmp_path):
    recall = {"task": "mqar", "gate": 0.5, "length": 64, "num_items": 8}
    config = settings(
        teacher, align={"steps": 0}, supernet={"steps": 0}, linear={"kind": "gla", "init": "copy"},
        placement={"objectives": {"recall": recall}, "full": 1},
    )  # fmt: skip
    search = Search(config, tmp_path, mesh)
    search.check()
    with pytest.raises(ValueError, match="objective recall: the teacher's accuracy is 0.0"):
        check_gates(search)  # before anything is trained
    with pytest.raises(ValueError, match="objective recall"):
        run(search, "placement")


def test_another_searchs_workdir_is_refused(done, teacher, mesh):
    search, _ = done
    other = Search(settings(teacher, seed=3), search.workdir, mesh)
    with pytest.raises(ValueError, match="holds another search:\n  seed: 0 there, 3 here"):
        other.check()
