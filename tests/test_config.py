"""ModelConfig: validation, equality, and counts that agree with real arrays."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from jet_jax.cache import init_cache
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import AttentionOptions, JetOptions, RopeOptions
from jet_jax.models.lm import HybridLM
from jet_jax.params import abstract, flatten, split, unflatten

ATTN = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def count(config):
    return sum(int(np.prod(x.shape)) for x in flatten(abstract(config)[1]).values())


@pytest.mark.parametrize(
    ("name", "parameters"), [("jet2b", 1_964_806_208), ("jet4b", 3_960_424_768)]
)
def test_published_sizes(name, parameters):
    """By formula and by counting the weights of the model."""
    values = importlib.import_module(f"configs.{name}").get_config().to_dict()["model"]
    config = ModelConfig.from_dict(values)
    assert config.param_count() == count(config) == parameters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "use_post_norms": True},
        {"mixers": {"attn": ATTN | {"qkv_bias": True, "o_bias": True, "qk_norm": True}},
         "layer_types": ("attn",)},
        {"mixers": {"jet": {"num_heads": 2, "head_dim": 6, "expand_v": 1.5, "conv_size": 3,
                            "generator_reduction": 2}}, "layer_types": ("jet",)},
    ],
)  # fmt: skip
def test_param_count_of_options(changes):
    config = tiny_config(**changes)
    assert config.param_count() == count(config)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_cache_bytes_are_those_of_the_cache(state_dtype):
    config = tiny_config(dtype="bfloat16", state_dtype=state_dtype)
    cache = jax.eval_shape(lambda: init_cache(config, 3, 50))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert config.cache_bytes(50, 3) == size


@pytest.mark.parametrize(
    ("layers", "context"), [(("attn",) * 3, 24), (("swa",) * 2, 24), (("jet",) * 3, 1)]
)
def test_flops_are_those_of_the_compiler(layers, context):
    """Within 6 % of XLA's count of one token over a full cache; elementwise work is not ours."""
    mixers = {
        "attn": AttentionOptions(4, 2, 32),
        "swa": AttentionOptions(4, 2, 32, window_size=context),
        "jet": JetOptions(2, 32, expand_v=2.0),
    }
    config = tiny_config(hidden_size=128, intermediate_size=256, layer_types=layers, mixers=mixers)
    graphdef, params = abstract(config)
    cache = jax.eval_shape(lambda: init_cache(config, 1, context))
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    step = jax.jit(lambda p, t, c: nnx.merge(graphdef, p).forward(t, cache=c))
    compiler = step.lower(params, token, cache).cost_analysis()["flops"]
    # The last token of a sequence sees every key, the mean token of the formula half of them.
    mean = sum(config.options(kind).mixing_flops(context, 128) for kind in layers)
    last = mean
    if layers[0] != "jet":
        last = sum(4 * 4 * 32 * context for _ in layers)
        assert mean == pytest.approx(last * (context + 1) / (2 * context))
    ours = config.flops_per_token(context) - mean + last
    assert ours == pytest.approx(compiler, rel=0.06)


def test_equality_and_hash():
    config = tiny_config()
    again = tiny_config(mixers=dict(reversed(config.mixers)))
    assert config == again and hash(config) == hash(again)
    assert config == config.replace(hf_json="{}")  # the text takes no part
    assert config != config.replace(rms_norm_eps=1e-5)
    assert ModelConfig.from_dict(config.to_dict()) == config
    eos = config.replace(eos_token_id=(1, 2))
    assert ModelConfig.from_dict(eos.to_dict()) == eos and eos.eos_ids == (1, 2)
    assert config.eos_ids == () and config.replace(eos_token_id=0).eos_ids == (0,)


def test_layers_keep_their_order():
    """Twelve layers through flat names in any order: 10 and 11 come after 9."""
    config = tiny_config(layer_types=("jet", "swa", "attn") * 4)
    model = HybridLM(config, rngs=nnx.Rngs(0))
    for i, layer in enumerate(model.layers):
        layer.input_layernorm.scale[...] = jnp.full((48,), float(i))
    graphdef, params = split(model)
    flat = flatten(params)
    assert list(params["layers"]) == list(range(12))
    back = nnx.merge(graphdef, unflatten({name: flat[name] for name in sorted(flat)}))
    assert [float(x.input_layernorm.scale[0]) for x in back.layers] == list(range(12))
    for name, value in flatten(split(back)[1]).items():
        np.testing.assert_array_equal(value, flat[name])


ERRORS = [
    ({"layer_types": ("jet", "mamba")}, "unknown layer type 'mamba' at layer 1; known types:"),
    ({"layer_types": ()}, "layer_types is empty"),
    ({"mixers": {"attn": ATTN}}, "layer 0 is 'jet', but mixers has no options for it"),
    ({"mixers": {"gsa": ATTN}}, "unknown layer type 'gsa' in mixers"),
    (
        {"mixers": {"attn": ATTN | {"num_head": 3}}},
        "unknown key 'num_head' in mixers['attn']; did you mean 'num_heads'?",
    ),
    ({"mixers": {"attn": {"num_heads": 4}}}, "mixers['attn']: "),
    (
        {"mixers": {"attn": ATTN | {"num_kv_heads": 3}}},
        "num_heads=4 is not divisible by num_kv_heads=3",
    ),
    ({"mixers": {"attn": ATTN | {"head_dim": 7}}}, "head_dim=7 is odd"),
    ({"mixers": {"attn": ATTN | {"num_heads": 0}}}, "num_heads=0 must be an integer of at least 1"),
    ({"mixers": {"attn": ATTN | {"window_size": 4}}}, "takes no window_size; use 'swa'"),
    ({"mixers": {"swa": ATTN}}, "mixers['swa'] needs window_size"),
    ({"mixers": {"swa": ATTN | {"window_size": 0}}}, "(the token itself counts)=0 must be"),
    (
        {"mixers": {"jet": {"num_heads": 2, "head_dim": 16, "expand_v": 2.6}}},
        "head_dim * expand_v = 41.6 is not an integer",
    ),
    (
        {"mixers": {"jet": {"num_heads": 3, "head_dim": 5, "generator_reduction": 4}}},
        "value width 30 is not divisible by generator_reduction=4",
    ),
    (
        {"mixers": {"jet": {"num_heads": 2, "head_dim": 8, "conv_size": 1}}},
        "conv_size=1 must be at least 2",
    ),
    ({"hidden_size": 0}, "hidden_size=0 must be an integer of at least 1"),
    ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; use silu or gelu_pytorch_tanh"),
    ({"dtype": "float16"}, "dtype='float16' is not one of bfloat16, float32"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 must be positive"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_errors_say_what_to_change(changes, message):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    assert message in str(error.value)


def test_key_typo():
    values = tiny_config().to_dict()
    values["hiden_size"] = values.pop("hidden_size")
    with pytest.raises(ValueError, match="unknown key 'hiden_size' in .*'hidden_size'"):
        ModelConfig.from_dict(values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dynamic"}, "rope type 'dynamic' is not supported"),
        ({"theta": 0.0}, "theta=0.0 must be positive"),
        ({"kind": "linear", "factor": -1.0}, "factor=-1.0 must be positive"),
        ({"kind": "yarn", "factor": 2.0}, "needs original_max_position_embeddings"),
    ],
)
def test_rope_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RopeOptions(**options)


def test_options_of_an_absent_layer_type():
    with pytest.raises(ValueError, match="no options for layer type 'jet'"):
        tiny_config(layer_types=("attn",), mixers={"attn": ATTN}).options("jet")
