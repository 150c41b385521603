"""The JetBlock: its start, its gradients and the float32 of its decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from jet_jax.mixers.context import Context
from jet_jax.models.lm import HybridLM
from jet_jax.params import abstract, flatten, split


@pytest.fixture(scope="module")
def fresh():
    config = tiny_config(layer_types=("jet",), hidden_size=64)
    return HybridLM(config, rngs=nnx.Rngs(0)).layers[0].mixer


def test_fresh_generator(fresh):
    """w1 random, w2 zero, static taps that pass the current value on."""
    generator = fresh.generator
    w1 = np.asarray(generator.w1[...])
    assert 0.018 < w1.std() < 0.022 and abs(w1.mean()) < 0.002
    assert not np.asarray(generator.w2[...]).any()
    taps = np.asarray(generator.b2[...])
    np.testing.assert_array_equal(taps[-1], np.ones(taps.shape[1]))
    assert taps.shape[0] == 4 and not taps[:-1].any()


def test_fresh_decay(fresh):
    """A within (0, 16]; softplus of dt_bias within [0.001, 0.1]."""
    a, dt = np.exp(fresh.A_log[...]), jax.nn.softplus(fresh.dt_bias[...])
    assert ((a > 0) & (a <= 16)).all()
    assert ((dt >= 1e-3 * 0.999) & (dt <= 0.1 * 1.001)).all()


def test_decay_stays_float32():
    """Whatever the weights' dtype: both sit inside exponentials."""
    dtypes = {n: x.dtype for n, x in flatten(abstract(tiny_config(), jnp.bfloat16)[1]).items()}
    for name, dtype in dtypes.items():
        is_decay = name.endswith(("A_log", "dt_bias"))
        assert dtype == (jnp.float32 if is_decay else jnp.bfloat16), name


def test_generator_learns_from_the_start(fresh):
    """w2 gets a gradient at once, and w1 as soon as w2 has moved."""
    graphdef, params = split(fresh)
    x = jax.random.normal(jax.random.key(1), (2, 12, 64))
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))

    @jax.jit
    def gradient(params):
        def loss(params):
            y, _, _ = nnx.merge(graphdef, params)(x, Context(None, positions, None))
            return jnp.sum(y**2)

        return jax.grad(loss)(params)

    first = flatten(gradient(params))
    assert not np.asarray(first["generator.w1"]).any()
    for name, value in first.items():
        if name != "generator.w1":
            assert np.isfinite(value).all() and np.abs(value).max() > 0, name
    moved = jax.tree.map(lambda p, g: p - 0.1 * g / jnp.linalg.norm(g), params, gradient(params))
    moved["generator"]["w1"] = params["generator"]["w1"]
    assert np.abs(gradient(moved)["generator"]["w1"]).max() > 0
