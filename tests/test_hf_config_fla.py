"""Configs of flash-linear-attention's models: defaults, attention layers, what is refused."""

import json

import pytest

from jet_jax.config import ModelConfig
from jet_jax.hf_names import expected
from jet_jax.mixer_options import AttentionOptions, RopeOptions

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_heads": 2, "num_hidden_layers": 4}
ATTN = {"layers": [1, 3], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "rope_theta": 5e4}


def read(model_type, **changes):
    return ModelConfig.from_hf(SIZES | {"model_type": model_type} | changes)


@pytest.mark.parametrize(
    ("model_type", "kind", "layers", "heads", "mlp"),
    [
        ("retnet", "retnet", 24, 8, 2816),
        ("gla", "gla", 24, 4, 5632),
        ("delta_net", "deltanet", 24, 16, 5632),
        ("gated_deltanet", "gdn", 21, 6, 5632),
        ("kda", "kda", 24, 16, 5632),
    ],
)
def test_class_defaults(model_type, kind, layers, heads, mlp):
    """A config.json that says nothing but its type."""
    config = ModelConfig.from_hf({"model_type": model_type})
    assert config.layer_types == (kind,) * layers
    options = config.options(kind)
    assert (options.num_heads, options.norm_eps, config.rms_norm_eps) == (heads, 1e-6, 1e-6)
    assert (config.hidden_size, config.vocab_size, config.intermediate_size) == (2048, 32000, mlp)
    assert not config.tie_word_embeddings and config.eos_ids == (2,)


def test_attention_layers():
    config = read("gla", attn=ATTN)
    assert config.layer_types == ("gla", "attn", "gla", "attn")
    rope = RopeOptions(theta=5e4)
    assert config.options("attn") == AttentionOptions(4, 2, 8, qkv_bias=True, rope=rope)
    both = read("gla", attn=[ATTN, ATTN | {"layers": [0], "window_size": 7}])
    assert both.layer_types == ("swa", "attn", "gla", "attn")
    assert both.options("swa").window_size == 7
    for model in (config, both):  # without its text
        written = json.loads(json.dumps(model.replace(hf_json=None).to_hf()))
        assert written["model_type"] == "gla" and ModelConfig.from_hf(written) == model
    names = expected(config)
    for name in (
        "model.embeddings.weight",
        "model.layers.0.attn_norm.weight",
        "model.layers.0.attn.gk_proj.1.bias",
        "model.layers.1.attn.k_proj.bias",
        "model.layers.3.mlp_norm.weight",
        "lm_head.weight",
    ):
        assert name in names, name


def test_a_convolution_that_the_published_retnet_never_makes():
    assert not read("retnet", use_short_conv=True).options("retnet").use_short_conv


def test_what_the_format_cannot_say_becomes_the_projects_own():
    config = read("gla")
    options = dict(config.mixers)["gla"]
    for change in ({"gate_low_rank_dim": 8}, {"conv_bias": True, "use_short_conv": True}):
        mixers = {"gla": {f: getattr(options, f) for f in vars(options)} | change}
        changed = config.replace(mixers=mixers)
        written = json.loads(json.dumps(changed.to_hf()))
        assert written["model_type"] == "jet_jax_hybrid"
        assert ModelConfig.from_hf(written) == changed


REFUSED = [
    ("gla", {"feature_map": "relu"}, "gla with feature_map='relu' is not supported"),
    ("retnet", {"elementwise_affine": False}, "elementwise_affine=False is not supported"),
    ("kda", {"attnres_block_size": 4}, "kda with attnres_block_size=4 is not supported"),
    ("delta_net", {"hidden_act": "powlu"}, "hidden_act='powlu' is not supported"),
    ("kda", {"safe_gate": True}, "safe_gate=True needs lower_bound"),
    ("gla", {"num_heads": 3}, "hidden_size * expand_k = 16 is not divisible by num_heads=3"),
    ("gla", {"attn": {"layers": [0]}}, "gla: attn has no 'num_heads'"),
    ("gla", {"attn": ATTN | {"layers": [4]}}, "attn names layers [4], but the model has 4"),
    ("gla", {"attn": ATTN | {"num_heads": 5}}, "not divisible by attn's num_heads=5"),
    (
        "gla",
        {"attn": [ATTN, ATTN | {"layers": [0], "num_kv_heads": 1}]},
        "two different attentions without a window",
    ),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_refused_by_name(model_type, changes, message):
    with pytest.raises(ValueError) as error:
        read(model_type, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize("model_type", ["retnet", "gla"])
def test_the_gates_activation_is_the_models(model_type):
    """These blocks pass hidden_act on; only "swish" is fused with the norm."""
    config = read(model_type, hidden_act="silu")
    assert config.options(model_type).gate_fn == "silu"
    norms = {name.split(".attn.")[1] for name in expected(config) if "g_norm" in name}
    assert norms == {"g_norm.weight"}
    written = config.replace(hf_json=None).to_hf()
    assert written["hidden_act"] == "silu" and ModelConfig.from_hf(written) == config
    assert read(model_type).options(model_type).gate_fn == "swish"
