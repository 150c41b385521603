"""A real pretrained model, SmolLM2-135M, against PyTorch's float32 results.

The files come from `python benchmarks/fetch_smollm2.py --passages`; golden/smollm2.npz holds what
golden/make_smollm2.py recorded from them. Perplexities are exp(sum of -log p / number of tokens)
over 25 passages each, every passage alone, its first token counted but not scored.
"""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import jet_jax
from jet_jax.cli import main
from jet_jax.params import split

ROOT = Path(__file__).parent.parent
MODEL = Path(os.environ.get("JET_SMOLLM_DIR", ROOT / "models" / "smollm2"))
pytestmark = [
    pytest.mark.smollm,
    pytest.mark.skipif(
        not (MODEL / "model.safetensors").is_file(),
        reason=f"no SmolLM2 in {MODEL}: run python benchmarks/fetch_smollm2.py --passages",
    ),
]
ROWS, LENGTH = 5, 320  # longer than any of the passages
# What conftest.py leaves out; these run for longer than they compile.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parent / "golden" / "smollm2.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def logits_of():
    """Float32 logits of token lists, padded to one shape so that one function is compiled."""
    graphdef, params = split(jet_jax.load(MODEL, dtype="float32"))
    run = jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a), compiler_options=OPTIMIZED)

    def logits(rows):
        tokens, segment_ids = np.zeros((2, ROWS, LENGTH), np.int32)
        for i, ids in enumerate(rows):
            tokens[i, : len(ids)], segment_ids[i, : len(ids)] = ids, 1
        return run(params, tokens, segment_ids)

    return logits


@pytest.fixture(scope="module")
def logprobs_of(logits_of):
    log_softmax = jax.jit(jax.nn.log_softmax, compiler_options=OPTIMIZED)
    return lambda rows: log_softmax(logits_of(rows))


def test_logits(recorded, logits_of):
    """Every position of three prompts: chosen logits, the likeliest tokens, the log-sum-exp."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [str(p) for p in recorded["prompts"]]
    rows = [tokenizer(p).input_ids for p in prompts]
    for i, (ids, logits) in enumerate(zip(rows, np.asarray(logits_of(rows)), strict=False)):
        np.testing.assert_array_equal(ids, recorded[f"ids_{i}"])
        ours, expected = logits[: len(ids)], recorded[f"logits_{i}"]
        chosen = ours[:, recorded["columns"]]
        assert np.linalg.norm(chosen - expected) < 2e-5 * np.linalg.norm(expected)
        np.testing.assert_array_equal(ours.argmax(-1), recorded[f"top_{i}"][:, 0])
        np.testing.assert_array_equal(
            np.sort(np.argsort(ours)[:, -5:]), np.sort(recorded[f"top_{i}"])
        )
        lse = jax.nn.logsumexp(ours.astype(np.float32), axis=-1)
        np.testing.assert_allclose(lse, recorded[f"logsumexp_{i}"], rtol=1e-5)


@pytest.mark.parametrize(("kind", "perplexity"), [("wikipedia", 27.09), ("owt", 29.71)])
def test_perplexity(recorded, logprobs_of, kind, perplexity):
    """Every passage within 1e-4 of PyTorch's loss, the perplexity within 0.5 % of the figure."""
    from transformers import AutoTokenizer

    path = MODEL / f"{kind}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}: run python benchmarks/fetch_smollm2.py --passages")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").split("\n")[:-1]]
    rows = [tokenizer(text).input_ids for text in texts]
    assert [len(row) for row in rows] == recorded[f"{kind}_tokens"].tolist()
    sums = []
    for start in range(0, len(rows), ROWS):
        batch = rows[start : start + ROWS]
        logprobs = np.asarray(logprobs_of(batch))  # NumPy compiles nothing for each length
        for i, ids in enumerate(batch):
            picked = logprobs[i, np.arange(len(ids) - 1), ids[1:]]
            sums.append(-picked.astype(np.float64).sum())
    np.testing.assert_allclose(sums, recorded[f"{kind}_nll"], rtol=1e-4)
    ours = np.exp(sum(sums) / sum(map(len, rows)))
    assert abs(ours / perplexity - 1) < 5e-3


def test_generate_continues_a_prompt(capsys):
    """The command, in float32, says what follows "The capital of France is"."""
    argv = ["generate", str(MODEL), "--prompt", "The capital of France is"]
    assert main([*argv, "--max-new-tokens", "4", "--dtype", "float32"]) == 0
    assert "The capital of France is Paris." in capsys.readouterr().out
