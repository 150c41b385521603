"""Scores of paths: one program, the untouched teacher as reference, figures that fit their rows."""

import jax
import nets
import numpy as np
import pytest

from jet_jax.evaluation import retrieval
from jet_jax.evaluation.harness import Forward, evaluate
from jet_jax.evaluation.rows import Passage, pack
from jet_jax.postnas.objectives import Objective, check_objectives
from jet_jax.postnas.path_scores import PathScorer
from jet_jax.sharding import make_mesh

ROWS = retrieval.mqar(range(1, 61), 0, 8, 48, num_pairs=4, num_queries=2, min_gap=2)
PATHS = [[0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]]


@pytest.fixture(scope="module")
def scorer():
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    objectives = [Objective("recall", ROWS, "loss"), Objective("text", ROWS, "kl")]
    params = {**nets.params(), "full": nets.params()["teacher"]["layers"]["mixer"]}
    return PathScorer(nets.supernet(), params, objectives, mesh, batch_size=4, chunk=2)


def test_scores_are_those_of_the_path_alone(scorer):
    found = scorer(PATHS)
    net = nets.supernet()

    def apply(params, batch):
        path, weights = params
        hidden, _ = net.run(weights, path, batch["tokens"], batch["segment_ids"])
        return hidden, net.head_kernel(weights)

    for path in PATHS:
        alone = evaluate(Forward(apply, (np.array(path, np.int32), nets.params())), ROWS, 4)
        assert found[tuple(path)]["recall"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    text = scorer.objective("text")
    kl = [text.value(found[tuple(path)]["text"]) for path in PATHS]
    assert abs(kl[0]) < 1e-6 and 0.01 < kl[1] and 0.01 < kl[2]


def test_a_call_tells_how_many_of_its_paths_are_scored(scorer):
    told = []
    other = PathScorer(
        scorer.net, scorer.params, scorer.objectives[:1], scorer.mesh, batch_size=4, chunk=2,
        advance=lambda *count: told.append(count),
    )  # fmt: skip
    other(PATHS)
    other(PATHS[:1])  # known
    other([[0, 1, 1, 0], *PATHS])
    assert told == [(0, 3), (2, 3), (3, 3), (0, 1), (1, 1)]


def test_a_trained_attention_is_compared_with_the_teachers(scorer):
    trained = jax.tree.map(lambda x: 1.5 * x, scorer.params["full"])
    other = PathScorer(
        scorer.net, {**scorer.params, "full": trained}, scorer.objectives, scorer.mesh,
        batch_size=4, chunk=2,
    )  # fmt: skip
    results = other(PATHS[:1])[(0, 0, 0, 0)]["text"]
    assert other.objective("text").value(results) > 0.01


def test_scores_come_back_from_their_file(scorer, tmp_path):
    file = tmp_path / "scores"
    found = scorer(PATHS)
    scorer.save(file)
    other = PathScorer(scorer.net, scorer.params, scorer.objectives, scorer.mesh)
    other.load(file)
    for path, results in found.items():
        for o in scorer.objectives:
            assert o.value(other.known[path][o.name]) == o.value(results[o.name])
        recall = scorer.objectives[0]
        mine, theirs = (recall.questions(x[path]["recall"]) for x in (found, other.known))
        assert np.array_equal(mine, theirs)


def test_scores_are_added_to_their_file(scorer, tmp_path):
    def new():
        return PathScorer(scorer.net, scorer.params, scorer.objectives, scorer.mesh)

    def loaded():
        reader = new()
        reader.load(file)
        return list(reader.known)

    file, writer = tmp_path / "scores", new()
    file.write_text("of an earlier search")
    known = list(scorer(PATHS).items())
    for count in (1, 3):
        writer.known |= dict(known[:count])
        writer.save(file)
        assert loaded() == [path for path, _ in known[:count]]
    whole = file.read_text()
    file.write_text(whole[:-9])  # killed while it was written
    assert loaded() == [path for path, _ in known[:2]]
    again = new()
    again.load(file)
    again.known |= dict(known)
    again.save(file)
    assert file.read_text() == whole


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ("acuracy", "is unknown"),
        ("loss@0-127", "is unknown"),
        ("choice_loss", "free answers"),
        ("kl@512-1023", "objective x: .* use one of kl@0-127, kl@128-511, kl@512-2047, kl@2048-$"),
        ("nll@", "names no known positions"),
        ("kl@128-511", "objective x: .* rows of 48 tokens hold answers at 0-127 only; .* longer"),
    ],
)
def test_figures_that_do_not_fit_are_refused(figure, message):
    with pytest.raises(ValueError, match=message):
        Objective("x", ROWS, figure)


def test_only_positions_that_are_scored_count():
    """Two texts in one row, with answers at their positions 300 and 199."""
    passages = [
        Passage([1] * before).ask([2]).write([1] * after) for before, after in ((301, 40), (200, 9))
    ]
    rows = pack(passages, 600, name="two")
    assert len(rows.tokens) == 1
    Objective("x", rows, "kl@128-511")
    for where in ("0-127", "512-2047", "2048-"):
        with pytest.raises(ValueError, match="answers at 128-511 only"):
            Objective("x", rows, f"kl@{where}")


def test_objectives_need_names_of_their_own():
    with pytest.raises(ValueError, match="two objectives are called 'x'"):
        check_objectives([Objective("x", ROWS, "loss")] * 2)
    with pytest.raises(ValueError, match="no objective"):
        check_objectives([])
