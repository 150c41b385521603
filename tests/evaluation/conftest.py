"""A small hybrid, the shipped tokenizer, and texts."""

import json
from pathlib import Path

import pytest
from flax import nnx
from tiny import tiny_config

from jet_jax.data.tokenizer import load_tokenizer
from jet_jax.models.lm import HybridLM

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"


@pytest.fixture(scope="session")
def make_model():
    """Returns a function from a seed to a model of one layer, far from uniform predictions."""

    def make(seed: int) -> HybridLM:
        config = tiny_config(layer_types=("swa",), initializer_range=0.2)
        return HybridLM(config, rngs=nnx.Rngs(seed))

    return make


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(QUICKSTART / "tokenizer")


@pytest.fixture(scope="session")
def documents():
    """The paragraphs of the shipped validation text, joined to texts of some thousand letters."""
    lines = (QUICKSTART / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    paragraphs = "\n\n".join(json.loads(line)["text"] for line in lines).split("\n\n")
    texts = ["\n\n".join(paragraphs[i : i + 20]) for i in range(0, len(paragraphs), 20)]
    return [text for text in texts if len(text) > 2000]
