"""The adapter for lm-eval, on local tasks; skipped where lm-eval is not installed."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

import jet_jax
from jet_jax.evaluation import lm_eval_tasks
from jet_jax.models.lm import HybridLM

TOKENIZER = Path(__file__).parents[2] / "data" / "quickstart" / "tokenizer"


def test_groups_are_the_tables_of_the_paper():
    entries = lm_eval_tasks.expand(["paper:commonsense", "lm:arc_easy", "lm:gsm8k@4"])
    assert [entry.task for entry in entries[:4]] == [
        "arc_challenge",
        "arc_easy",
        "piqa",
        "openbookqa",
    ]
    assert all(entry.group == "commonsense" and entry.shots == 0 for entry in entries[:7])
    assert entries[7:] == [
        lm_eval_tasks.Entry("arc_easy"),
        lm_eval_tasks.Entry("gsm8k", None, 4),
    ]
    math = {e.task: (e.metric, e.shots) for e in lm_eval_tasks.expand(["paper:math"])}
    assert math["gsm8k"] == ("exact_match,flexible-extract", 4)
    assert math["mathqa"] == ("acc_norm", 0)


def test_metrics_are_picked_by_name():
    results = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25}
    assert lm_eval_tasks.pick(results, None) == ("acc", 0.5, 0.1)
    assert lm_eval_tasks.pick(results, "acc_norm") == ("acc_norm", 0.25, None)
    with pytest.raises(ValueError, match="gave no f1,none, only acc,none, acc_norm,none"):
        lm_eval_tasks.pick(results, "f1")


@pytest.fixture(scope="module")
def adapter():
    pytest.importorskip("lm_eval")
    from jet_jax.evaluation import lm_eval_adapter

    return lm_eval_adapter


@pytest.fixture(scope="module")
def model():
    config = tiny_config(vocab_size=2048, layer_types=("jet",), initializer_range=0.5)
    return HybridLM(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def lm(adapter, model, tokenizer):
    return adapter.JetLM(model, tokenizer, batch_size=3, max_length=32, max_gen_toks=20)


def requests(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def log_probs(model, ids):
    logits = np.asarray(jax.jit(lambda x: model(x))(np.array([ids], np.int32)), np.float64)[0]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


PAIRS = [
    ("Anne was", " a very good girl"),
    ("", "It was a truth"),
    ("Nothing was said of it for a long time. " * 8, " She was not at home"),
    ("She had ", "been there"),  # the space goes to the continuation
]


def test_loglikelihoods_are_those_of_the_model(lm, model, tokenizer):
    got = lm.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, text), (value, is_greedy) in zip(PAIRS, got, strict=True):
        before = tokenizer.encode(context.rstrip()).tolist() or [lm.prefix_token_id]
        whole = tokenizer.encode(context + text).tolist()
        after = whole[len(before) :] if context else whole
        ids = [*before, *after][-33:]  # rows of 32 tokens hold 33 with the last target
        logs = log_probs(model, ids[:-1])[-len(after) :]
        expected = logs[np.arange(len(after)), after].sum()
        assert value == pytest.approx(expected, rel=1e-4)
        assert is_greedy == bool((logs.argmax(-1) == after).all())


def test_greedy_texts_are_said_to_be_greedy(lm, model, tokenizer):
    context = tokenizer.encode(PAIRS[0][0]).tolist()
    new = jet_jax.generate(model, [context], 4, eos_id=())[0]
    changed = [*new[:-1], (new[-1] + 1) % 2048]
    got = lm._loglikelihood_tokens([("", context, new), ("", context, changed)], disable_tqdm=True)
    assert [is_greedy for _, is_greedy in got] == [True, False]


def test_rolling_windows_score_each_token_once(lm, model, tokenizer):
    text = "It was a truth that she had been there for a long time before he came. " * 4
    ids = tokenizer.encode(text).tolist()
    assert len(ids) > 64  # three windows
    (got,) = lm.loglikelihood_rolling(requests((text,)), disable_tqdm=True)
    expected, before = 0.0, [lm.prefix_token_id, *ids]
    for start in range(0, len(ids), 32):
        window = ids[start : start + 32]
        context = before[start : start + 1]
        if len(window) < 32:  # the last window reaches back
            context = before[len(ids) - 32 : start + 1]
        logs = log_probs(model, [*context, *window[:-1]])[-len(window) :]
        expected += logs[np.arange(len(window)), window].sum()
    assert got == pytest.approx(expected, rel=1e-4)


def test_generation_ends_at_the_stop_string_and_at_the_limit(lm, model, tokenizer):
    context = PAIRS[0][0]
    ids = tokenizer.encode(context).tolist()
    new = jet_jax.generate(model, [ids], 20, eos_id=lm.end_ids)[0]
    whole = tokenizer.decode(new)
    (free,) = lm.generate_until(requests((context, {"until": []})), disable_tqdm=True)
    assert free == whole and len(whole) > 8
    stop = whole[5:8]
    asked = [
        (context, {"until": [stop, "never said"], "do_sample": False}),
        (PAIRS[3][0], {"until": "never said", "max_gen_toks": 3}),
        (context, {"until": [stop, "never said"], "do_sample": False}),
    ]
    got = lm.generate_until(requests(*asked), disable_tqdm=True)
    assert got[0] == got[2] == whole[: whole.index(stop)]
    other = tokenizer.encode(PAIRS[3][0]).tolist()
    short = jet_jax.generate(model, [other], 3, eos_id=lm.end_ids)[0]
    assert got[1] == tokenizer.decode(short)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of lm-eval over local files: a choice, a generation, one whose data are not there."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = [
        {"question": f"Who came {i} times?", "choices": ["Anne", "Mr. Elliot"], "answer": i % 2}
        for i in range(6)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "data.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    choice = {
        "task": "tiny_choice",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    text = {
        "task": "tiny_text",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    missing = choice | {
        "task": "tiny_missing",
        "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}},
    }
    for task in (choice, text, missing):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))
    (folder / "model").mkdir()
    return folder


@pytest.mark.filterwarnings("ignore")
def test_the_command_runs_local_tasks(adapter, model, tokenizer, folder, capsys):
    from jet_jax.cli import main
    from jet_jax.evaluation.choices import choice_rows, read_records
    from jet_jax.evaluation.harness import evaluate

    jet_jax.save(model, folder / "model", tokenizer_dir=TOKENIZER, overwrite=True)
    base = ["eval", f"{folder}/model", "--lm-tasks", str(folder), "--tasks"]
    out = folder / "out.json"
    words = ["lm:tiny_choice", "lm:tiny_text@1", "--json", str(out), "--length", "64"]
    assert main([*base, *words]) == 0, capsys.readouterr().err
    choice, text = json.loads(out.read_text())["lm_eval"]["model"]
    rows = choice_rows(tokenizer, read_records(folder / "data.jsonl"), 64)
    assert choice["value"] == pytest.approx(evaluate(model, rows)["accuracy"])
    assert (choice["metric"], choice["shots"]) == ("acc", None)
    assert text["metric"] == "exact_match" and text["shots"] == 1 and 0 <= text["value"] <= 1
    assert main([*base, "lm:tiny_missing"]) == 1
    assert "the data of lm:tiny_missing cannot be loaded" in capsys.readouterr().err
    assert main([*base, "lm:tiny_choise"]) == 1
    assert "lm-eval has no task 'tiny_choise'; did you mean tiny_choice" in capsys.readouterr().err
