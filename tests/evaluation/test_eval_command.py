"""`jet-jax eval` on a tiny model with the quick start's tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

import jet_jax
from jet_jax.cli import main
from jet_jax.evaluation import comparisons, harness, statistics, tasks
from jet_jax.evaluation.ablation import without_linear
from jet_jax.evaluation.rows import Passage, pack
from jet_jax.models.lm import HybridLM

TOKENIZER = Path(__file__).parents[2] / "data" / "quickstart" / "tokenizer"


def make(seed, **changes):
    fields = {"vocab_size": 2048, "layer_types": ("jet",), "initializer_range": 0.3}
    return HybridLM(tiny_config(**(fields | changes)), rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    """A model, a teacher, others that do not fit, texts and questions."""
    folder = tmp_path_factory.mktemp("eval")
    jet_jax.save(make(0), folder / "model", tokenizer_dir=TOKENIZER)
    jet_jax.save(make(1), folder / "teacher")
    jet_jax.save(make(1, vocab_size=2056, layer_types=("swa",)), folder / "other")
    jet_jax.save(
        make(1, layer_types=("swa",), max_position_embeddings=128),
        folder / "attention",
        tokenizer_dir=TOKENIZER,
    )

    def write(name, records):
        (folder / name).write_text("\n".join(map(json.dumps, records)), encoding="utf-8")

    write("texts.jsonl", [{"text": text[:1200]} for text in documents[:4]])
    write(
        "questions.jsonl",
        [{"question": f"Who? {i}", "choices": ["Anne", "Emma"], "answer": i % 2} for i in range(9)],
    )
    write("wrong.jsonl", [{"question": "Who?", "choices": ["Anne", "Emma"]}])
    (folder / "empty.jsonl").write_text("")
    (folder / "empty.txt").write_text(" \n")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    """What one call with everything writes; all rows are of one length, so it compiles little."""
    words = [
        "eval",
        f"{folder}/model",
        "--tasks",
        "mqar",
        "perplexity",
        f"{folder}/questions.jsonl",
    ]
    words += ["--teacher", f"{folder}/teacher", "--without-linear", "--documents"]
    words += [f"{folder}/texts.jsonl", "--length", "160", "--items", "4", "--batch", "4"]
    words += ["--free-running", "3", "--json", f"{folder}/out.json", "--seed", "2"]

    def free_running(model, teacher, prompts, new_tokens, **options):  # has its own test
        nll = {"student_nll": np.arange(4) + 1.0, "teacher_nll": np.ones(4)}
        assert [len(prompt) for prompt in prompts] == [64] * 4 and new_tokens == 3
        return {"per_prompt": {"agreed": np.arange(4) / 2, **nll}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "free_running", free_running)
        assert main(words) == 0
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_figures_are_those_of_the_harness(report, folder, tokenizer):
    model = jet_jax.load(folder / "model", dtype="float32")
    teacher = jet_jax.load(folder / "teacher", dtype="float32")
    rows = tasks.TASKS["mqar"].rows(tokenizer, tasks.Settings(160, 4, 2))
    # The texts fill mqar's text; other rows therefore, and other figures.
    documents = tasks.read_documents([f"{folder}/texts.jsonl"])
    filled = tasks.TASKS["mqar"].rows(tokenizer, tasks.Settings(160, 4, 2, documents=documents))
    assert (rows.tokens != filled.tokens).any()
    expected = harness.evaluate(model, filled, 4, teacher)
    got = report["tasks"]["mqar"]
    assert got["questions"] == 16 and got["texts"] == 4 and got["length"] == 160
    for name in ("accuracy", "loss", "kl", "agreement"):
        assert got["models"]["model"][name] == pytest.approx(expected[name], rel=1e-5)
    assert got["models"]["model"]["kl"] > 0.1 and "kl" not in got["models"]["teacher"]
    assert list(got["models"]) == ["model", "teacher", "no_linear"]


def test_perplexity_has_positions_intervals_and_differences(report):
    result = report["tasks"]["perplexity"]
    ours, theirs = (result["models"][name] for name in ("model", "teacher"))
    assert ours["low"] < ours["value"] < ours["high"]
    assert set(ours["buckets"]) == {"0-127", "128-511", "all"}
    assert ours["value"] == pytest.approx(ours["buckets"]["all"]["nll"], rel=1e-5)
    difference = result["differences"]["teacher"]
    assert difference["value"] == pytest.approx(ours["value"] - theirs["value"], rel=1e-4)
    assert "p_value" not in difference
    assert theirs["value"] == pytest.approx(ours["buckets"]["all"]["teacher_nll"], rel=1e-5)


def test_choices_are_tested_by_question(report, folder):
    result = report["tasks"][f"{folder}/questions.jsonl"]
    correct = {name: m["per_question"]["correct"] for name, m in result["models"].items()}
    assert result["texts"] == result["questions"] == 4
    assert result["models"]["model"]["value"] == np.mean(correct["model"])
    for name in ("teacher", "no_linear"):
        test = statistics.mcnemar(correct["model"], correct[name])
        assert result["differences"][name].items() >= test._asdict().items()
        losses = [result["models"][n]["loss"] for n in ("model", name)]
        assert result["differences"][name]["loss"]["value"] == pytest.approx(
            losses[0] - losses[1], rel=1e-4, abs=1e-6
        )


def test_the_report_says_what_ran_where(report, folder):
    assert report["model"] == f"{folder}/model" and report["dtype"] == "float32"
    assert report["versions"]["jax"] and "cpu" in report["device"]
    assert report["settings"]["seed"] == 2 and report["settings"]["length"] == 160
    free = report["free_running"]
    assert free["new_tokens"] == 3 and free["prompts"] == 4 == len(free["per_prompt"]["agreed"])
    mean, low, high = free["excess_nll"]
    assert low < mean == 1.5 < high


def test_without_linear_zeroes_the_recurrent_layers_alone():
    model = make(3, layer_types=("jet", "swa", "jet"))
    other = without_linear(model)
    for i, is_linear in enumerate((True, False, True)):
        theirs, ours = (m.layers[i].mixer.o_proj.kernel[...] for m in (other, model))
        assert (not theirs.any()) == is_linear and ours.any()
        if not is_linear:
            assert theirs is ours  # shared, not copied


def test_texts_hold_the_questions_that_belong_together(tokenizer):
    first = Passage([1]).ask([2]).write([3]).ask([4])
    rows = pack([first, Passage([5]).ask([6]), Passage([7]).ask([8])], 4, name="three")
    np.testing.assert_array_equal(comparisons.texts_of(rows), [0, 0, 1, 2])
    sums = tasks.TASKS["addition"].rows(tokenizer, tasks.Settings(None, 3))
    np.testing.assert_array_equal(np.bincount(comparisons.texts_of(sums)), [4, 4, 4])


def test_every_task_makes_rows_of_its_own_length(tokenizer, documents):
    settings = tasks.Settings(items=2, documents=tuple(documents[:20]))
    for name, task in tasks.TASKS.items():
        rows = task.rows(tokenizer, settings)
        assert rows.tokens.shape[1] == task.length, name
        assert len(task.about) < 80


def test_list_names_every_task(capsys):
    assert main(["eval", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines]
    assert names[: len(tasks.TASKS)] == list(tasks.TASKS)
    assert "paper:commonsense" in names and all("  " in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model; name a directory"),
        (["M"], "no tasks; give --tasks NAME"),
        (
            ["M", "--tasks", "mqarr"],
            "unknown task 'mqarr', did you mean 'mqar'? known are mqar, ph",
        ),
        (["M", "--tasks", "zzz"], "unknown task 'zzz'; known are"),
        (["M", "--tasks", "cloze", "copy"], "cloze: give texts with --documents"),
        (["M", "--tasks", "cloze", "--documents", "D/no.txt"], "no files match"),
        (["M", "--tasks", "cloze", "--documents", "D/empty.txt"], "no documents in"),
        (["M", "--tasks", "D/empty.jsonl"], "holds no records"),
        (["M", "--tasks", "D/wrong.jsonl"], "line 1: no key 'answer'"),
        (["M", "--tasks", "D/none.jsonl"], "No such file"),
        (["M", "--tasks", "mqar", "--length", "40"], "mqar: length=40 is too short"),
        (["D/attention", "--tasks", "mqar", "--length", "200"], "max_position_embeddings of 128"),
        (["D/attention", "--tasks", "mqar"], "mqar has rows of 512 tokens, the model takes 128"),
        (["M", "--tasks", "mqar", "--items", "0"], "--items 0 must be at least 1"),
        (["M", "--tasks", "mqar", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["M", "--free-running", "4"], "--free-running needs --teacher"),
        (["M", "--tasks", "mqar", "--teacher", "D/other"], "the teacher has 2056 tokens"),
        (["M", "--tasks", "mqar", "--teacher", "D/none"], "none does not exist"),
        (["D/attention", "--tasks", "copy", "--length", "96", "--without-linear"], "only swa"),
        (["D/teacher", "--tasks", "mqar"], "has no tokenizer"),
        (["M", "--tasks", "mqar", "--json", "D/none/out.json"], "does not exist"),
        (["M", "--tasks", "mqar", "--template", "Q:"], "does not hold {question}"),
        (["M", "--tasks", "paper:comonsense"], "did you mean paper:commonsense?"),
        (["M", "--tasks", "paper:evalplus"], "have tools of their own"),
        (["M", "--tasks", "lm:gsm8k@x"], "expected lm:TASK or lm:TASK@SHOTS"),
        (["M", "--tasks", "lm:gsm8k", "--lm-tasks", "D/none"], "is not a directory"),
    ],
)
def test_wrong_input_is_one_line_and_loads_no_weights(words, message, folder, capsys, monkeypatch):
    monkeypatch.setattr("jet_jax.io.load", lambda *args, **kwargs: pytest.fail("loaded weights"))
    words = [f"{folder}/model" if w == "M" else w.replace("D/", f"{folder}/") for w in words]
    assert main(["eval", *words]) == 1
    out, err = capsys.readouterr()
    assert not out and err.startswith("jet-jax eval: error: ") and err.count("\n") == 1
    assert message in err


def test_without_lm_eval_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    assert main(["eval", f"{folder}/model", "--tasks", "lm:arc_easy"]) == 1
    assert "pip install 'jet-jax[eval]'" in capsys.readouterr().err
