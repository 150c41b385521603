"""Hugging Face configs: spellings, defaults, refusals by name, and the way back."""

import json
from pathlib import Path

import pytest

from jet_jax.config import ModelConfig
from jet_jax.mixer_options import RopeOptions

GOLDEN = Path(__file__).parent / "golden"
CONFIGS = sorted(GOLDEN.glob("**/config.json"))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
JET = {"num_heads": 2, "head_dim": 12, "expand_v": 2, "dconv_generator_reduction": 4}


def read(model_type, **changes):
    return ModelConfig.from_hf(SIZES | {"model_type": model_type} | changes)


def rope(model_type="qwen2", layer="attn", **changes):
    return read(model_type, **changes).options(layer).rope


@pytest.mark.parametrize("path", CONFIGS, ids=[p.parent.name for p in CONFIGS])
def test_golden_configs_come_back(path):
    """Unchanged, the original text; changed, a config of the same kind that says the change."""
    text = path.read_text()
    config = ModelConfig.from_hf(text)
    assert config.to_hf() == json.loads(text)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    changed = config.replace(vocab_size=99)
    written = changed.to_hf()
    assert written["model_type"] == json.loads(text)["model_type"]
    assert ModelConfig.from_hf(written) == changed
    # Without the text (a model made here) the same architecture is found.
    assert ModelConfig.from_hf(config.replace(hf_json=None).to_hf()) == config


def test_a_hybrid_of_our_own_comes_back():
    config = read("qwen2", qk_norm=True).replace(rms_norm_eps=1e-4)
    jet = {"num_heads": 2, "head_dim": 8, "generator_reduction": 4}
    attn = dict(config.mixers)["attn"]
    hybrid = config.replace(layer_types=("jet", "attn", "jet"), mixers={"jet": jet, "attn": attn})
    assert hybrid.to_hf()["model_type"] == "jet_nemotron"
    gated = hybrid.replace(use_post_norms=True)  # no published architecture has both
    written = json.loads(json.dumps(gated.to_hf()))
    assert written["model_type"] == "jet_jax_hybrid"
    assert ModelConfig.from_hf(written) == gated


def test_rope_spellings():
    new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    old = {"type": "linear", "factor": 2.0}
    expected = RopeOptions(5e5, "linear", 2.0)
    assert rope(rope_parameters=new) == expected
    assert rope(rope_scaling=old, rope_theta=5e5) == expected
    assert rope() == rope(rope_scaling=None) == RopeOptions(1e4)
    assert rope(rope_theta=7) == RopeOptions(7.0)


def test_yarn_factor():
    """An explicit factor wins; absent or null it is the ratio of the two lengths."""
    yarn = {"type": "yarn", "original_max_position_embeddings": 16}
    assert rope(rope_scaling=yarn | {"factor": 3.0}).factor == 3.0
    assert rope(rope_scaling=yarn).factor == rope(rope_scaling=yarn | {"factor": None}).factor == 8
    assert (
        rope(rope_scaling={"type": "yarn", "factor": 3.0}).original_max_position_embeddings == 128
    )


def test_windows():
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert read("qwen2", **window, max_window_layers=1).layer_types == ("attn", "swa", "swa")
    assert read("qwen2", **window).layer_types == ("attn",) * 3  # from layer 28 on
    assert read("qwen2", **window, max_window_layers=0).options("swa").window_size == 8
    off = {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}
    none = {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}
    for changes in (off, none):
        assert read("qwen3", **changes).layer_types == ("attn",) * 3
    assert read("llama", **window, max_window_layers=0).layer_types == ("attn",) * 3


def test_gemma3_old_keys():
    config = read(
        "gemma3_text",
        head_dim=8,
        num_hidden_layers=7,
        sliding_window_pattern=3,
        rope_local_base_freq=300.0,
        rope_theta=2e6,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
        query_pre_attn_scalar=24,
    )
    assert config.layer_types == ("swa", "swa", "attn", "swa", "swa", "attn", "swa")
    assert config.options("attn").rope == RopeOptions(2e6, "linear", 8.0)
    assert config.options("swa").rope == RopeOptions(300.0)
    assert config.options("swa").scale == 24**-0.5
    assert config.norm_offset == 1 and config.use_post_norms and config.embedding_scale


def test_class_defaults():
    assert read("qwen3").options("attn").head_dim == 128
    assert read("qwen2").options("attn").head_dim == 8
    assert read("gemma3_text").options("swa").window_size == 4096
    assert read("llama", num_key_value_heads=None).options("attn").num_kv_heads == 4
    assert [read(m).tie_word_embeddings for m in ("qwen2", "llama", "gemma3_text")] == [0, 0, 1]
    assert read("llama").eos_token_id == 2 and read("llama").rms_norm_eps == 1e-6
    assert read("qwen2", dtype="float32").dtype == read("qwen2", torch_dtype="float32").dtype


def test_jet_nemotron_layer_types():
    efficient = {"efficient_attention_config": {"jet": JET, "swa": {"window_size": 5}}}
    listed = ["jet", "swa", "attn"]
    config = read("jet_nemotron", layer_types=listed, **efficient)
    assert config == read("jet_nemotron", layer_types=str(listed), **efficient)
    assert config.layer_types == ("jet", "swa", "attn")
    assert read("jet_nemotron", layer_types=None).layer_types == ("attn",) * 3
    assert config.options("swa").rope.theta == 1e6
    assert config.options("jet").norm_eps == 1e-5 and config.options("jet").conv_size == 4


REFUSED = [
    ("mamba", {}, "model_type 'mamba' is not supported; supported: qwen2, qwen3, llama"),
    ("gemma3", {}, "model_type 'gemma3' is not supported"),
    ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not"),
    (
        "qwen2",
        {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
        "rope type 'longrope' is not supported; supported are default, linear, llama3, yarn",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "proportional", "factor": 1.0}},
        "rope type 'proportional' is not supported",
    ),
    ("qwen2", {"rope_scaling": {"type": "mrope", "factor": 1}}, "rope type 'mrope' is not"),
    (
        "qwen2",
        {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2]}},
        "mrope_section (multimodal rope) is not supported",
    ),
    ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported"),
    ("qwen2", {"rope_scaling": {"type": "linear"}}, "rope type 'linear' needs a 'factor'"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "rope type 'llama3' needs 'low_freq_factor'",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"mlp_bias": True}, "llama with mlp_bias=True is not supported (only False)"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp=2 is not supported"),
    ("qwen2", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
    ("qwen2", {"dtype": "int8"}, "dtype='int8' is not supported"),
    (
        "gemma3_text",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention=True is not supported",
    ),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not"),
    (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "one entry for 'full_attention' and one for 'sliding_attention'",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
        "layer type 'chunked_attention' at layer 1 is not supported",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "use_sliding_window is false",
    ),
    ("qwen2", {"layer_types": ["full_attention"]}, "num_hidden_layers=3 but layer_types has 1"),
    ("qwen2", {"vocab_size": None}, "the qwen2 config has no 'vocab_size'"),
    ("qwen2", {"hidden_size": 34}, "hidden_size=34 is not divisible by num_attention_heads=4"),
    ("qwen2", {"vocab_size": 0}, "vocab_size=0 must be an integer of at least 1"),
    ("jet_nemotron", {"layer_types": ["jet"] * 3}, "efficient_attention_config.jet is missing"),
    ("jet_nemotron", {"layer_types": ["swa"] * 3}, "swa.window_size is missing"),
    ("jet_nemotron", {"layer_types": "[jet"}, "layer_types='[jet' is not a list of layer types"),
    (
        "jet_nemotron",
        {"layer_types": ["jet", "gsa", "attn"], "efficient_attention_config": {"jet": JET}},
        "unknown layer type 'gsa' at layer 1",
    ),
    ("jet_jax_hybrid", {}, "the jet_jax_hybrid config has no 'config'"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_refused_by_name(model_type, changes, message):
    with pytest.raises(ValueError) as error:
        read(model_type, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "message"), [("{", "not JSON"), ("[1]", "a JSON list")])
def test_not_a_config(text, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(text)
