"""One training step: sharded, accumulated, frozen and in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_batch, run_compiled, tiny_config

from jet_jax import optim, params, sharding, step
from jet_jax.models.lm import HybridLM

CONFIG = tiny_config()
# A large eps: Adam's first update would else be lr * sign(gradient), and weights whose gradient is
# at rounding level would differ.
OPTIM = optim.OptimConfig(lr=1e-2, schedule="constant", weight_decay=0.1, eps=1e-3)


@pytest.fixture(scope="module")
def model():
    return params.split(HybridLM(CONFIG, rngs=nnx.Rngs(0)))


def run_step(model, mesh, batch, config=OPTIM, **options):
    graphdef, weights = model
    weights = jax.tree.map(jnp.copy, weights)  # the step donates its state
    trainable, _ = optim.partition(weights, config.freeze)
    tx, schedule = optim.make_optimizer(config, 10, trainable)
    with jax.set_mesh(mesh):
        state = step.init_state(weights, config.freeze, tx)
        state = jax.device_put(state, sharding.shardings(state, mesh))
        options = {"dtype": jnp.float32} | options
        train_step = step.make_train_step(graphdef, tx, schedule, state, mesh, **options)
        state, metrics = run_compiled(train_step, state, sharding.put_batch(batch, mesh))
    return state, metrics


@pytest.fixture(scope="module")
def single():
    return sharding.make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def batch():
    return random_batch(0, 8, 16)


@pytest.fixture(scope="module")
def expected(model, single, batch):
    return run_step(model, single, batch)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12)


def assert_same_update(got, want):
    """Compares states leaf by leaf: weights and moments, the first of which is the gradient."""
    got, want = jax.device_get(got), jax.device_get(want)
    pairs = zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True)
    for (path, a), b in pairs:
        assert relative(a, b) < 2e-5, (jax.tree_util.keystr(path), relative(a, b))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_sharded_equals_unsharded(model, batch, expected, sizes):
    mesh = sharding.make_mesh(*sizes)
    state, metrics = run_step(model, mesh, batch)
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert_same_update(state, expected[0])
    # The step returns the state where it took it from.
    placed = jax.tree.map(lambda x: x.sharding, state)
    assert placed == sharding.shardings(state, mesh)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_sharded_logits_equal_unsharded(model, batch, sizes):
    graphdef, weights = model

    @jax.jit
    def logits(weights, tokens, segment_ids):
        return nnx.merge(graphdef, weights)(tokens, segment_ids)

    want = run_compiled(logits, weights, batch["tokens"], batch["segment_ids"])
    mesh = sharding.make_mesh(*sizes)
    with jax.set_mesh(mesh):
        placed = jax.device_put(weights, sharding.shardings(weights, mesh))
        rows = sharding.put_batch(batch, mesh)
        got = run_compiled(logits, placed, rows["tokens"], rows["segment_ids"])
    real = batch["segment_ids"] != 0
    assert relative(np.asarray(got)[real], np.asarray(want)[real]) < 1e-5


def test_accumulation_and_remat_equal_one_large_batch(batch, expected):
    # Parts with unequal token counts: a mean of means would differ.
    assert len({int(batch["loss_mask"][i::2].sum()) for i in range(2)}) > 1
    language_model = HybridLM(CONFIG, rngs=nnx.Rngs(0))
    language_model.remat = "full"
    mesh = sharding.make_mesh(2, 2, 2)
    state, metrics = run_step(params.split(language_model), mesh, batch, accumulation=2)
    for name, value in expected[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    assert_same_update(state, expected[0])


def test_frozen_weights_stay_and_the_rest_moves(model, single, batch, expected):
    config = optim.OptimConfig(
        lr=1e-2, schedule="constant", freeze=(r"mlp", r"embed_tokens", r"layers\.1\.mixer")
    )
    state, metrics = run_step(model, single, batch, config)
    before = params.flatten(model[1])
    after = params.flatten(jax.device_get(state.all_params()))
    assert after.keys() == before.keys()
    frozen = params.flatten(state.frozen)
    assert len(frozen) == 3 * 3 + 1 + 7
    for path, value in after.items():
        assert np.array_equal(value, before[path]) == (path in frozen), path
    np.testing.assert_allclose(metrics["loss"], expected[1]["loss"], rtol=1e-5)
    assert 0 < float(metrics["grad_norm"]) < float(expected[1]["grad_norm"])


def test_bfloat16_compute_keeps_float32_state(single, batch, expected):
    model = params.split(HybridLM(tiny_config(dtype="bfloat16"), rngs=nnx.Rngs(0)))
    state, metrics = run_step(model, single, batch, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    np.testing.assert_allclose(metrics["loss"], expected[1]["loss"], rtol=1e-2)
    np.testing.assert_allclose(metrics["grad_norm"], expected[1]["grad_norm"], rtol=5e-2)


def test_cast_leaves_gates_and_the_embedding_in_float32(model):
    flat = params.flatten(step.cast_params(model[1], jnp.bfloat16))
    kept = {path for path, x in flat.items() if x.dtype == jnp.float32}
    assert kept == {"embed_tokens.embedding", "layers.0.mixer.A_log", "layers.0.mixer.dt_bias"}


def test_eval_step_sums_the_same_loss(model, batch, expected):
    mesh = sharding.make_mesh(2, 2, 2)
    graphdef, weights = model
    with jax.set_mesh(mesh):
        weights = jax.device_put(weights, sharding.shardings(weights, mesh))
        eval_step = step.make_eval_step(graphdef, weights, mesh, dtype=jnp.float32)
        sums = run_compiled(eval_step, weights, sharding.put_batch(batch, mesh))
    assert float(sums["tokens"]) == batch["loss_mask"].sum()
    np.testing.assert_allclose(sums["loss"] / sums["tokens"], expected[1]["loss"], rtol=1e-5)
