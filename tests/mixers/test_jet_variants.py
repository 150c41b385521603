"""The blocks between Gated DeltaNet and the JetBlock: where convolutions are, and what learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrent_cases import WIDTH, make, random, relative
from tiny import tiny_config

from jet_jax import optim, sharding
from jet_jax.cache import init_cache
from jet_jax.cache_parts import kept
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import OPTIONS
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Context
from jet_jax.params import abstract, flatten
from jet_jax.postnas.ablations import ABLATIONS, ablation_arms
from jet_jax.postnas.arms import arm_options
from jet_jax.postnas.comparison_config import ComparisonConfig

BASE = {"num_heads": 2, "head_dim": 16, "expand_v": 1.5, "generator_reduction": 4}
ALL = ("query", "key", "value")
MIXED = {"dynamic": ("query", "value"), "static": ("key",)}


def run(graphdef, params, x):
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return nnx.merge(graphdef, params)(x, Context(None, positions))[0]


@pytest.mark.parametrize("use_gate", [True, False])
def test_learned_taps_on_all_rows_are_gated_deltanet(use_gate):
    shape = {"num_heads": 3, "head_dim": 8, "expand_v": 1.5, "use_gate": use_gate}
    _, jet, weights = make("jet", shape | {"dynamic": (), "static": ALL})
    _, gdn, expected = make("gdn", shape)
    assert flatten(weights).keys() == flatten(expected).keys()
    x = random(3, 2, 9, WIDTH)
    ours, theirs = jax.jit(lambda p, x: (run(jet, p, x), run(gdn, p, x)))(weights, x)
    assert relative(ours, theirs) < 1e-6


@pytest.mark.parametrize("row", ALL)
def test_constant_generated_taps_are_learned_ones(row):
    """With w2 = 0 a generated convolution is a static one, on whichever row."""
    shape = {"num_heads": 3, "head_dim": 8, "generator_reduction": 4}
    config, dynamic, weights = make("jet", shape | {"dynamic": (row,)})
    (name,) = config.options("jet").generators.values()
    assert name == {"query": "q_generator", "key": "k_generator", "value": "generator"}[row]
    _, static, expected = make("jet", shape | {"dynamic": (), "static": (row,)})
    constant = dict(weights[name], w2=jnp.zeros_like(weights[name]["w2"]))
    expected = {k: weights.get(k, v) for k, v in expected.items()}
    expected[f"{row[0]}_conv1d"] = {"taps": constant["b2"]}
    x = random(3, 2, 9, WIDTH)
    both = jax.jit(lambda p, q, x: (run(dynamic, p, x), run(static, q, x)))
    ours, theirs = both({**weights, name: constant}, expected, x)
    assert relative(ours, theirs) < 1e-6
    ours, theirs = both(weights, expected, x)
    assert relative(ours, theirs) > 1e-2


def test_a_frozen_generator_does_not_move():
    """Neither by a gradient nor by weight decay; its taps differ from token to token."""
    options = BASE | {"dynamic": ("key", "value"), "freeze_generator": True}
    _, graphdef, params = make("jet", options)
    x, r = random(3, 2, 9, WIDTH), random(4, 2, 9, WIDTH)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(run(graphdef, p, x) * r)))(params)
    settings = optim.OptimConfig(lr=0.1, schedule="constant", weight_decay=0.5)
    optimizer, _ = optim.make_optimizer(settings, 10, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    frozen = [f"frozen_{name}generator.{w}" for name in ("k_", "") for w in ("w1", "w2")]
    assert set(frozen) < flatten(params).keys()
    for name, value in flatten(updates).items():
        assert np.any(value) == (name not in frozen), name


def test_a_frozen_generator_starts_at_random():
    config = tiny_config(mixers={"jet": BASE | {"freeze_generator": True}}, layer_types=("jet",))
    mixer = MIXERS["jet"](config, config.options("jet"), rngs=nnx.Rngs(0))
    for name in ("w1", "w2"):
        assert 0.017 < np.std(getattr(mixer.frozen_generator, name)[...]) < 0.023


VARIANTS = [
    {},
    {"use_gate": False, "conv_size": 2},
    {"dynamic": (), "static": ("value",), "conv_size": 8},
    {"dynamic": ()},
    MIXED | {"freeze_generator": True, "conv_size": 3, "generator_reduction": 16},
    {"dynamic": ALL},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_counts_are_those_of_the_arrays(changes):
    """Parameters, products with weights, FLOPs and cache bytes, all exact."""
    config = tiny_config(layer_types=("jet",), mixers={"jet": BASE | changes})
    options, width = config.options("jet"), config.hidden_size
    weights = flatten(abstract(config)[1]["layers"][0]["mixer"])
    sizes = {name: leaf.size for name, leaf in weights.items()}
    assert options.param_count(width) == sum(sizes.values())
    taps = {name: n for name, n in sizes.items() if name.endswith(("b2", "taps"))}
    matrices = sum(n for name, n in sizes.items() if weights[name].ndim > 1 and name not in taps)
    assert options.matmul_params(width) == matrices
    assert options.mixing_flops(100, width) == 6 * 2 * 16 * 24 + 2 * sum(taps.values())
    cache = jax.eval_shape(lambda: init_cache(config, 3, 10))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    assert config.cache_bytes(10, 3) == held
    rows = [row[0] for row in ALL if row in (*options.dynamic, *options.static)]
    assert [row for row in "qkv" if f" {row} " in kept(config, "jet")] == rows
    assert ModelConfig.from_dict(config.to_dict()) == config
    hf = config.to_hf()
    assert ModelConfig.from_hf(hf) == config
    assert hf["model_type"] == "jet_jax_hybrid" or not changes  # none published says so


def test_all_convolutions_are_split_on_a_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    _, graphdef, params = make("jet", BASE | MIXED | {"freeze_generator": True})
    for path, leaf in flatten(params).items():
        if path.endswith(("w2", "taps")):
            spec = sharding.placement(f"layers.0.mixer.{path}", leaf.shape, mesh).spec
            assert spec[-1] == "tensor", path
    x = random(3, 4, 9, WIDTH)
    expected = jax.jit(lambda p, x: run(graphdef, p, x))(params, x)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        here = jax.device_put(x, sharding.batch_sharding(mesh))
        y = jax.jit(lambda p, x: run(graphdef, p, x))(placed, here)
    assert relative(y, expected) < 3e-6


ERRORS = [
    ({"static": ("value",)}, "value cannot be in both dynamic=('value',) and static=('value',)"),
    ({"dynamic": ("v",)}, "dynamic=('v',) names ['v']; known are 'query', 'key', 'value'"),
    ({"dynamic": "value"}, "dynamic='value' must be a tuple of names"),
    ({"dynamic": (), "freeze_generator": True}, "dynamic=() has no generator to freeze"),
    ({"generator_reduction": 5}, "value width 48 is not divisible by generator_reduction=5"),
    ({"dynamic": ("key",), "generator_reduction": 3}, "key width 32 is not divisible by"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS)
def test_errors_say_what_to_change(changes, message):
    with pytest.raises(ValueError) as error:
        OPTIONS["jet"](**BASE | changes)
    assert message in str(error.value)


def test_ablation_arms():
    base = BASE | {"generator_reduction": 8}
    arms = ComparisonConfig(ablation_arms(base)).arms
    blocks = {name: OPTIONS[arm.kind](**arm.options) for name, arm in arms.items()}
    assert blocks["jet"] == OPTIONS["jet"](**base)
    assert len(set(blocks.values())) == len(blocks)  # no block is trained twice
    assert ABLATIONS.keys() - blocks.keys() == {"taps-4", "reduction-8"}
    assert {block.state_shape(48) for block in blocks.values()} == {(2, 16, 24)}
    counts = {name: block.param_count(48) for name, block in blocks.items()}
    assert counts["frozen"] == counts["jet"] < counts["reduction-4"]
    assert counts["taps-2"] < counts["taps-3"] < counts["jet"] < counts["taps-8"]
    assert counts["static-v"] < counts["jet"] and counts["no-gate"] < counts["jet"]
    assert blocks["gdn"].use_short_conv and not blocks["no-conv"].tails(48)
    with pytest.raises(ValueError, match=r"base_options \['taps'\] are no options"):
        ablation_arms({"taps": 3})


def test_ablations_match_the_heads_of_a_teacher():
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    teacher = tiny_config(layer_types=("attn",) * 2, mixers={"attn": attention}, hidden_size=64)
    for name, arm in ComparisonConfig(ablation_arms({"conv_size": 3})).arms.items():
        options = arm_options(teacher, name, arm)
        assert options.state_shape(64) == (4, 16, 16)
        assert options.conv_size == (int(name[-1]) if name.startswith("taps") else 3)
