"""Hybrids of every recurrent layer type: training on a mesh, generation, scans over layers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_batch, run_compiled, tiny_config

import jet_jax
from jet_jax import optim, params, sharding, step
from jet_jax.cache import init_cache
from jet_jax.mixers.context import Context

# Sizes that two devices divide, and some that they do not.
MIXERS = {
    "retnet": {"num_heads": 4, "num_kv_heads": 2},
    "gla": {"num_heads": 2, "gate_low_rank_dim": 5},
    "deltanet": {"num_heads": 3},
    "gdn": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8},
    "mamba2": {"head_dim": 16, "state_size": 6},
    "rwkv7": {"head_dim": 8},
    "kda": {"num_heads": 4, "head_dim": 8},
}
LAYERS = ("retnet", "rwkv7", "gla", "rwkv7", "deltanet", "gdn", "mamba2", "kda")


def tiny_hybrid(*layers):
    return tiny_config(
        layer_types=layers,
        mixers={kind: MIXERS[kind] for kind in layers},
        intermediate_size=32,
    )


def random_model(*layers):
    """Weights large enough that every one matters; a fresh RWKV-7 layer would add nothing."""
    config = tiny_hybrid(*layers)
    graphdef, shapes = params.abstract(config)
    rng = np.random.default_rng(1)
    weights = {}
    for path, shape in params.flatten(shapes).items():
        noise = rng.standard_normal(shape.shape)
        scale = 0.3 if "embed" in path else max(shape.shape[-2:-1] or (4,)) ** -0.5
        is_scale = path.endswith(("scale", "k_k", "k_a", ".D"))
        weights[path] = jnp.asarray(is_scale + scale * noise, jnp.float32)
    return nnx.merge(graphdef, params.unflatten(weights))


@pytest.fixture(scope="module")
def model():
    return random_model(*LAYERS)


def relative(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


@pytest.mark.slow
def test_training_step_on_eight_devices(model):
    """Loss as on one device; the gradient, leaf by leaf, against differences of that loss.

    A whole step on one device would double the compile time.
    """
    graphdef, weights = params.split(model)
    batch = random_batch(0, 4, 16)
    mesh = sharding.make_mesh(2, 2, 2)
    config = optim.OptimConfig(lr=1e-2, clip_norm=0.0)
    tx, schedule = optim.make_optimizer(config, 10, weights)
    with jax.set_mesh(mesh):
        state = step.init_state(jax.tree.map(jnp.copy, weights), (), tx)
        state = jax.device_put(state, sharding.shardings(state, mesh))
        train = step.make_train_step(graphdef, tx, schedule, state, mesh, dtype=jnp.float32)
        state, metrics = run_compiled(train, state, sharding.put_batch(batch, mesh))
    moments = jax.tree_util.tree_leaves_with_path(jax.device_get(state.opt_state))
    first = {sharding.dotted(path): np.asarray(x) for path, x in moments}
    before = jax.device_get(params.flatten(weights))
    after = jax.device_get(params.flatten(state.params))

    arrays = {name: jnp.asarray(x) for name, x in batch.items()}

    @jax.jit
    def mean_loss(weights):
        total, _ = step.batch_loss(graphdef, weights, arrays, jnp.float32)
        return total / jnp.sum(arrays["loss_mask"])

    loss = mean_loss.lower(weights).compile({"xla_backend_optimization_level": 0})
    assert float(metrics["loss"]) == pytest.approx(float(loss(weights)), rel=1e-5)
    for name, value in before.items():
        (moment,) = (x for path, x in first.items() if path.endswith(f"mu.{name}"))
        gradient = moment / (1 - config.b1)
        size = np.linalg.norm(gradient)
        assert size > 0 and np.abs(after[name] - value).max() > 0, name

        def slope(shift, name=name, value=value, unit=gradient / size):
            moved = [before | {name: value + s * unit} for s in (shift, -shift)]
            up, down = (float(loss(params.unflatten(m))) for m in moved)
            return (up - down) / (2 * shift)

        # Less of a shift where the loss is so curved that the larger one shows it.
        shifts = (2e-3 / size, 5e-4 / size)
        assert any(abs(slope(s) / size - 1) < 0.03 for s in shifts), (name, size)


@pytest.mark.slow
def test_generation_on_eight_devices_equals_the_uncached_forward(model):
    """Greedy tokens of ragged prompts, in chunks and steps, by whole forward passes too."""
    graphdef, weights = params.split(model)
    mesh = sharding.make_mesh(2, 2, 2)
    placed = jax.device_put(weights, sharding.shardings(weights, mesh))
    prompts = [[5, 6, 7], [9] * 11, [1, 200, 30, 4, 77]]
    generator = jet_jax.Generator(graphdef=graphdef, params=placed, lanes=4, prefill_chunk=8)
    generated = generator.generate(prompts, 6, eos_id=())
    rows, width = len(prompts), 20
    tokens, ids = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.int32)
    for row, (prompt, new) in enumerate(zip(prompts, generated, strict=True)):
        tokens[row, : len(prompt) + 6] = prompt + new
        ids[row, : len(prompt) + 6] = 1
    run = jax.jit(lambda w, t, s: nnx.merge(graphdef, w)(t, s))
    logits = run_compiled(run, weights, tokens, ids)
    for row, (prompt, new) in enumerate(zip(prompts, generated, strict=True)):
        at = slice(len(prompt) - 1, len(prompt) + 5)
        assert np.argmax(logits[row, at], axis=-1).tolist() == new


def test_every_weight_hits_a_named_rule(model):
    mesh = sharding.make_mesh(2, 2, 2)
    vectors = re.compile(r"(\.|^)(scale|bias|A_log|dt_bias|D|x_\w|k_k|k_a|r_k)$")
    for path, x in params.flatten(params.split(model)[1]).items():
        rule = sharding.placement(path, x.shape, mesh).rule
        assert (rule == "replicated") == bool(vectors.search(path)), (path, rule)
        assert bool(re.search(optim.NO_DECAY, path)) == bool(vectors.search(path)), path


def test_counts_are_those_of_the_arrays(model):
    config = model.config
    weights = params.flatten(params.split(model)[1])
    assert config.param_count() == sum(x.size for x in weights.values())
    cache = jax.eval_shape(lambda: init_cache(config, 3, 50))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.layers))
    assert config.cache_bytes(50, 3) == size


@pytest.mark.parametrize("format", ["hf", "orbax"])
def test_saved_and_loaded_bit_for_bit(model, tmp_path, format):
    """A hybrid that no published architecture holds, in the project's own config."""
    jet_jax.save(model, tmp_path / "model", format=format)
    loaded = jet_jax.load(tmp_path / "model", dtype=None)
    assert loaded.config == model.config
    assert loaded.config.to_hf()["model_type"] == "jet_jax_hybrid"
    expected = params.flatten(params.split(model)[1])
    for name, value in params.flatten(params.split(loaded)[1]).items():
        assert value.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_weights_that_stay_float32(model):
    """Whatever the others' dtype: they sit inside exponentials, or scale the skip."""
    kept = re.compile(r"(\.|^)(A_log|dt_bias|D)$")
    for name, x in params.flatten(params.abstract(model.config, jnp.bfloat16)[1]).items():
        assert x.dtype == (jnp.float32 if kept.search(name) else jnp.bfloat16), name


def test_only_the_first_rwkv7_layer_has_no_value_residual(model):
    has = [hasattr(layer.mixer, "v_lora") for layer in model.layers]
    assert has == [False, False, False, True, False, False, False, False]


def test_scanned_layers_pass_the_first_values_on():
    """The RWKV-7 layers after the first are one loop on the device."""
    model = random_model("deltanet", "rwkv7", "rwkv7", "rwkv7")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 12)), jnp.int32)
    outputs = []
    for model.scan_layers in (False, True):
        graphdef, weights = params.split(model)
        run = jax.jit(lambda w, t, graphdef=graphdef: nnx.merge(graphdef, w)(t))
        outputs.append(run_compiled(run, weights, tokens))
    assert model._runs(True) == [[0], [1], [2, 3]]
    assert relative(*outputs) < 1e-5


def test_random_weights_know_their_layer():
    """`step.random_params` starts RWKV-7's layers by their depth, with one program for several."""
    config = tiny_hybrid("rwkv7", "mamba2", "rwkv7", "rwkv7")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    made = step.random_params(config, mesh, 0)
    shapes = params.flatten(step.abstract_model(config)[1])
    flat = params.flatten(made)
    assert {k: v.shape for k, v in flat.items()} == {k: v.shape for k, v in shapes.items()}
    layers, width = 4, config.hidden_size
    channel = np.arange(width) / width
    for i in (0, 2, 3):
        mixer = made["layers"][i]["mixer"]
        expected = 1 - channel ** (0.7 * (1 - i / layers))
        np.testing.assert_allclose(mixer["x_k"][0, 0], expected, atol=1e-5)
        np.testing.assert_allclose(mixer["g_norm"]["scale"], ((i + 1) / layers) ** 0.7, rtol=1e-5)
        kernel = np.asarray(mixer["r_proj"]["kernel"])
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(width), atol=1e-5)
        assert not np.asarray(mixer["o_proj"]["kernel"]).any()
    out = np.asarray(made["layers"][1]["mixer"]["out_proj"]["kernel"])
    limit = (out.shape[0] * layers) ** -0.5
    assert 0.9 * limit < np.abs(out).max() <= limit


def test_a_later_rwkv7_layer_alone_says_what_it_needs(model):
    later = model.layers[3].mixer
    with pytest.raises(ValueError, match="has no 'v_first'; run that layer before"):
        later(jnp.ones((1, 4, 48)), Context(None, jnp.arange(4)[None]))
