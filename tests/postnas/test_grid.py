"""`jet-jax info` on the points of the paper's hardware-aware search, and on its two models."""

import importlib
import json
from pathlib import Path

import jax
import pytest

from jet_jax.cache import init_cache
from jet_jax.cache_parts import kept, rounded_mib
from jet_jax.cli import main
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import OPTIONS
from jet_jax.train_config import TrainConfig
from tests.tiny import tiny_config

CONFIGS = Path(__file__).parent.parent.parent / "configs"

# Parameters in billions: our counts, three digits. The paper's table 2 prints 1.62 1.64 1.70 1.66
# 1.70 1.74 1.78 1.84 1.98, the fourth of which is probably a misprint.
PARAMETERS = {
    "256-288-4": 1.615,
    "192-384-4": 1.639,
    "128-576-4": 1.705,
    "256-144-8": 1.691,
    "192-192-8": 1.696,
    "128-288-8": 1.743,
    "128-192-12": 1.781,
    "96-256-12": 1.838,
    "64-384-12": 1.979,
}


def info(capsys, path):
    assert main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("shape", PARAMETERS)
def test_the_nine_points(capsys, shape):
    facts = info(capsys, f"{CONFIGS / 'grid2b.py'}:{shape}")
    assert facts["pattern"] == "14 gdn, attn, 4 gdn, attn, 2 swa, 6 gdn"
    assert round(facts["parameters"]["total"] / 1e9, 3) == PARAMETERS[shape]
    assert facts["parameters"]["embedding"] == 151936 * 1536  # tied, Qwen2.5-1.5B's
    at = facts["contexts"].index(65536)
    parts = {kind: part["bytes"][at] / 2**20 for kind, part in facts["cache_parts"].items()}
    assert parts["attn"] == 128 and parts["swa"] == 2.25
    assert 27.4 <= parts["gdn"] < 27.9  # 27 of states, equal in all; the rows of convolutions
    assert sum(parts.values()) == facts["cache_bytes"][at] / 2**20
    assert facts["cache_rounded_mib"][at] == 154


@pytest.mark.parametrize(
    ("name", "parameters", "mib", "rounded", "base"),
    [
        ("jet2b", 1_964_806_208, 157.67, 154, 1792),
        ("jet4b", 3_960_424_768, 258.61, 258, 2304),
    ],
)
def test_the_two_models(capsys, name, parameters, mib, rounded, base):
    """`base`: Qwen2.5-1.5B's and 3B's own cache in MiB, exact without rounding."""
    facts = info(capsys, CONFIGS / f"{name}.py")
    at = facts["contexts"].index(65536)
    assert facts["parameters"]["total"] == parameters
    assert round(facts["cache_bytes"][at] / 2**20, 2) == mib
    assert facts["cache_rounded_mib"][at] == rounded
    assert facts["all_attention"]["cache_bytes"][at] == base * 2**20


def test_the_formula_is_printed(capsys):
    assert main(["info", f"{CONFIGS / 'grid2b.py'}:96-256-12"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "K and V of all tokens: 2·T·2·128",
        "K and V of the last 1152 tokens:",
        "state 12·96·256 float32; last rows q",
        "154 MiB with each layer's cache rounded",
    ):
        assert text in out, text


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_formula_gives_the_cache(kind):
    """The numbers in the words are those of the arrays that decoding allocates."""
    config = tiny_config()
    if kind not in dict(config.mixers):
        options = {"rwkv7": {"head_dim": 8}, "mamba2": {"head_dim": 8, "expand": 2}}
        mixers = {kind: options.get(kind, {"num_heads": 2})}
        config = tiny_config(layer_types=(kind,), mixers=mixers)
    config = config.replace(layer_types=(kind,), state_dtype="bfloat16")
    text = kept(config, kind).replace("T·", "30·")
    total = 0
    for part in text.split("; "):
        size = 2 if "bfloat16" in part else 4
        products = [word.strip(",") for word in part.split() if "·" in word]
        assert products, part
        for product in products:
            elements = 1
            for factor in product.split("·"):
                elements *= int(factor)
            total += size * elements
    cache = jax.eval_shape(lambda: init_cache(config, 1, 30))
    assert total == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert total == config.cache_bytes(30)


def test_grid_config():
    module = importlib.import_module("configs.grid2b")
    values = module.get_config("64-384-12").to_dict()
    text = {"train": ("x.txt",), "tokenizer": "tokenizer"}
    model = TrainConfig.from_dict(values | {"data": {**values["data"], **text}}).model
    assert model.options("gdn").state_shape(1536) == (12, 64, 384)
    assert model.options("gdn").use_short_conv and model.options("gdn").conv_size == 4
    first = ModelConfig.from_dict(module.get_config().model.to_dict())
    assert first.options("gdn").state_shape(1536) == (4, 192, 384)
    with pytest.raises(ValueError, match=r"96-256-11.*270,336 elements, not 294,912"):
        module.get_config("96-256-11")
    with pytest.raises(ValueError, match="'fast' is no shape"):
        module.get_config("fast")


def test_rounding_is_a_layer_at_a_time():
    """Two layers of 0.6 MiB are 2, not 1."""
    attention = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 2}
    config = tiny_config(layer_types=("attn",) * 2, mixers={"attn": attention})
    context = round(0.6 * 2**20 / 16)
    assert rounded_mib(config, context) == 2 and round(config.cache_bytes(context) / 2**20) == 1
