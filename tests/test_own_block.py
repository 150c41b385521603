"""The worked example of docs/own_block.md, run as a reader would, and what registering refuses."""

import dataclasses
import re
import sys
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_batch, tiny_config

import jet_jax
from jet_jax import cache, mixer_options, mixers
from jet_jax.cache import init_cache
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import OPTIONS
from jet_jax.mixers import MIXERS
from jet_jax.models.lm import HybridLM
from jet_jax.option_checks import MixerOptions
from jet_jax.params import flatten, split
from jet_jax.postnas import inherit
from jet_jax.postnas.arms import hybrid_config
from jet_jax.postnas.supernet import stack
from jet_jax.recurrent_options import RecurrentOptions
from jet_jax.train_config import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "own_block.md"
TABLES = (mixers.MIXERS, mixer_options.OPTIONS, cache.STATES, inherit.STARTS, inherit.MATCHED)
SLOTS = {"num_heads": 3, "head_dim": 8}


@pytest.fixture(scope="module", autouse=True)
def tables():
    """Leaves the tables of layer types as they were."""
    before = [dict(table) for table in TABLES]
    yield
    for table, old in zip(TABLES, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page's files on the path, by name."""
    folder = tmp_path_factory.mktemp("own_block")
    blocks = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for name, text in blocks:
        (folder / name).write_text(text)
    sys.path.insert(0, str(folder))
    names = [name.removesuffix(".py") for name, _ in blocks]
    yield {name: import_module(name) for name in names}
    sys.path.remove(str(folder))
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(page):
    """Two layers of slots around one of attention, with weights that matter."""
    config = tiny_config(
        layer_types=("slots", "attn", "slots"),
        mixers={"slots": SLOTS, "attn": tiny_config().options("attn")},
        initializer_range=0.2,
    )
    return HybridLM(config, rngs=nnx.Rngs(0))


def test_every_code_block_is_run(page):
    assert PAGE.read_text().count("```python\n") == len(page)


def test_counts_are_those_of_the_arrays(model):
    config = model.config
    weights = flatten(split(model)[1])
    assert config.param_count() == sum(leaf.size for leaf in weights.values())
    state = jax.eval_shape(lambda: init_cache(config, 2, 9)).layers
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert config.cache_bytes(9, 2) == held


def test_it_learns(model):
    """Every weight of the mixer has a gradient, in packed rows."""
    graphdef, params = split(model)
    batch = {name: jnp.asarray(array) for name, array in random_batch(0, 2, 12).items()}

    @jax.jit
    def gradient(params):
        def loss(params):
            logits = nnx.merge(graphdef, params)(batch["tokens"], segment_ids=batch["segment_ids"])
            losses = -jax.nn.log_softmax(logits)[..., 0] * batch["loss_mask"]
            return jnp.sum(losses)

        return jax.grad(loss)(params)

    for name, value in flatten(gradient(params)["layers"][0]["mixer"]).items():
        assert np.isfinite(value).all() and np.any(value), name


def test_prefill_and_decoding_equal_the_whole(model):
    graphdef, params = split(model)
    tokens = jnp.asarray(random_batch(1, 2, 10)["tokens"])

    @jax.jit
    def run(params, tokens, cache):
        out = nnx.merge(graphdef, params).forward(tokens, cache=cache)
        return out.logits, out.cache

    whole, _ = run(params, tokens, None)
    state, parts = init_cache(model.config, 2, 10), []
    for start, end in ((0, 4), (4, 8), (8, 9), (9, 10)):
        logits, state = run(params, tokens[:, start:end], state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_packed_sequences_are_apart(model):
    tokens = random_batch(2, 1, 10)["tokens"]
    segment_ids = np.array([[1] * 4 + [2] * 6])
    run = jax.jit(lambda tokens, ids: model(tokens, segment_ids=ids))
    packed = run(tokens, segment_ids)
    alone = run(tokens[:, 4:], segment_ids[:, 4:])
    np.testing.assert_allclose(packed[:, 4:], alone, rtol=1e-4, atol=1e-4)


def test_saved_models_say_what_to_import(model, tmp_path, monkeypatch):
    for form in ("hf", "orbax"):
        jet_jax.save(model, tmp_path / form, format=form)
        loaded = jet_jax.load(tmp_path / form, dtype="float32")
        old, new = (flatten(split(m)[1]) for m in (model, loaded))
        assert all(np.array_equal(new[name], value) for name, value in old.items())
    for table in TABLES:
        monkeypatch.delitem(table, "slots")
    for form in ("hf", "orbax"):
        with pytest.raises(ValueError, match=r"'slots' in mixers.* the file that registers it"):
            jet_jax.load(tmp_path / form)


def test_the_config_file(page):
    config = TrainConfig.from_dict(page["slots_tiny"].get_config("smoke").to_dict())
    assert config.model.layer_types == ("slots", "swa", "slots", "attn")
    assert config.model.options("slots") == page["slots"].SlotsOptions(2, 32)


def test_in_a_supernet(page):
    """A path with slots: it starts from the attention and its loss has a gradient."""
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    teacher = tiny_config(
        layer_types=("attn",) * 2, mixers={"attn": attention}, initializer_range=0.2
    )
    net = page["slots_supernet"].supernet(teacher)
    weights = stack(split(HybridLM(teacher, rngs=nnx.Rngs(0)))[1])
    tokens = jnp.asarray(random_batch(3, 2, 8)["tokens"])

    @jax.jit
    def step(weights, key):
        linear = net.random_linear(key)
        start = jax.vmap(lambda a, f: inherit.from_attention(net.config, "slots", a, f))
        linear = start(weights["layers"]["mixer"], linear)

        def loss(linear):
            hidden, _ = net.run({"teacher": weights, "linear": linear}, jnp.array([0, 1]), tokens)
            return jnp.mean(hidden[..., 0])

        return linear, jax.grad(loss)(linear)

    linear, gradient = step(weights, jax.random.key(1))
    mixer = weights["layers"]["mixer"]
    np.testing.assert_array_equal(linear["q_proj"]["kernel"], mixer["q_proj"]["kernel"])
    values = np.asarray(mixer["v_proj"]["kernel"]).reshape(2, 48, 2, 8).repeat(2, axis=2)
    np.testing.assert_array_equal(linear["v_proj"]["kernel"], values.reshape(2, 48, 32))
    np.testing.assert_array_equal(np.abs(linear["v_conv1d"]["taps"]).sum(1), np.ones((2, 32)))
    for name, value in flatten(gradient).items():
        assert np.any(value[1]) and not np.any(value[0]), name  # the path's second layer alone


def test_in_a_comparison(page):
    settings = page["slots_comparison"].settings
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    teacher = tiny_config(layer_types=("attn",) * 2, mixers={"attn": attention})
    for name, arm in settings.arms.items():
        hybrid = hybrid_config(teacher, [0, 1], name, arm)
        if arm.kind == "slots":
            size = 2 if name == "slots_conv2" else 4
            assert hybrid.options("slots") == page["slots"].SlotsOptions(4, 8, conv_size=size)
    assert {"gdn", "jet", "slots", "slots_conv2", "frozen"} < settings.arms.keys()
    with pytest.raises(ValueError, match="arm 'reduction-16': value width 24 is not divisible"):
        heads = tiny_config(
            layer_types=("attn",), mixers={"attn": dict(attention, num_heads=6, head_dim=4)}
        )
        hybrid_config(heads, [1], "reduction-16", settings.arms["reduction-16"])


def test_registering_again(page):
    slots = page["slots"]
    again = type("Slots", (slots.Slots,), {"__module__": "slots", "__qualname__": "Slots"})
    before = {kind: MIXERS[kind] for kind in MIXERS}
    jet_jax.register_mixer("slots", again, slots.SlotsOptions)  # as when a notebook runs again
    assert MIXERS["slots"] is again and list(MIXERS) == list(before)
    assert "slots" not in inherit.STARTS
    config = ModelConfig(8, 24, 8, ("slots",), {"slots": SLOTS})
    with pytest.raises(ValueError, match="'slots' can start \"random\" only"):
        inherit.from_attention(config, "slots", {}, {})
    with pytest.raises(ValueError, match="no options of 'slots' match"):
        inherit.matched_options("slots", tiny_config().options("attn"), 48)
    jet_jax.register_mixer(
        "slots",
        slots.Slots,
        slots.SlotsOptions,
        from_attention=slots.from_attention,
        matched=slots.matched,
    )


class Bare(nnx.Module):
    def __init__(self, config, options, *, rngs):
        pass

    def __call__(self, x):
        return x


@dataclasses.dataclass
class Thawed(MixerOptions):
    pass


@dataclasses.dataclass(frozen=True)
class Uncounted(MixerOptions):
    def cache_bytes(self, context, dtype_bytes, state_bytes, hidden_size):
        return 0


@dataclasses.dataclass(frozen=True)
class Shapeless(RecurrentOptions):
    def matmul_params(self, hidden_size, first=False):
        return 0


GDN, GDN_OPTIONS = MIXERS["gdn"], OPTIONS["gdn"]
REFUSED = [
    (("gla", GDN, GDN_OPTIONS), {}, "layer type 'gla' is taken by"),
    (("my block", GDN, GDN_OPTIONS), {}, "kind='my block' names a layer type"),
    (("mine", Bare, GDN_OPTIONS), {}, "'mine': Bare.__init__.* param_dtype, place by name"),
    (("mine", GDN, Thawed), {}, "'mine': Thawed must be a frozen dataclass"),
    (("mine", GDN, TrainConfig), {}, "TrainConfig must derive from MixerOptions"),
    (
        ("mine", GDN, Uncounted),
        {},
        "Uncounted lacks the methods param_count, matmul_params",
    ),
    (("mine", GDN, Shapeless), {}, "Shapeless lacks the methods state_shape, tails, vector_params"),
    (("mine", GDN, OPTIONS["attn"]), {}, "does not derive from RecurrentOptions; give state="),
    (("mine", GDN, GDN_OPTIONS), {"from_attention": lambda x: x}, "from_attention.* with 4 argum"),
    (("mine", GDN, GDN_OPTIONS), {"matched": lambda x: x}, "'mine': matched.* with 2 arguments"),
    (("mine", GDN, GDN_OPTIONS), {"state": int}, "state <class 'int'> has no init"),
]


@pytest.mark.parametrize(("arguments", "more", "message"), REFUSED)
def test_what_does_not_fit_is_refused(arguments, more, message):
    with pytest.raises(ValueError, match=message):
        jet_jax.register_mixer(*arguments, **more)
    assert "mine" not in MIXERS and "mine" not in OPTIONS
