"""Runs of equal layers as one loop: the same numbers as layer by layer, whatever is remade."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jet_jax import params
from jet_jax.config import ModelConfig
from jet_jax.models import remat
from jet_jax.models.lm import HybridLM

ATTENTION = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "qkv_bias": True}
CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    layer_types=("jet", "jet", "swa", "swa", "swa", "attn"),
    mixers={
        "jet": {"num_heads": 2, "head_dim": 8},
        "swa": ATTENTION | {"window_size": 5},
        "attn": ATTENTION,
    },
    dtype="float32",
)


@pytest.fixture(scope="module")
def model():
    return HybridLM(CONFIG, rngs=nnx.Rngs(0))


def loss_features_and_gradients(model, scan, policy):
    model.scan_layers, model.remat = scan, policy
    graphdef, weights = params.split(model)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, CONFIG.vocab_size)
    ids = jnp.asarray([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], jnp.int32)

    def loss(weights):
        out = nnx.merge(graphdef, weights).forward(
            tokens, segment_ids=ids, collect=("hidden_states", "mixer_outputs")
        )
        return jnp.mean(out.logits**2), out.features

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(weights)


@pytest.fixture(scope="module")
def layer_by_layer(model):
    return loss_features_and_gradients(model, False, "none")


@pytest.mark.parametrize("policy", ["none", "full", "dots_saveable"])
def test_scan_equals_layer_by_layer(model, layer_by_layer, policy):
    got = loss_features_and_gradients(model, True, policy)
    assert jax.tree.structure(got) == jax.tree.structure(layer_by_layer)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(layer_by_layer), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_only_neighbours_of_equal_structure_are_joined(model):
    model.scan_layers = True
    assert model._runs(True) == [[0, 1], [2, 3, 4], [5]]
    assert model._runs(False) == [[i] for i in range(6)]


def test_an_unknown_policy_is_refused_by_name():
    with pytest.raises(ValueError, match="unknown remat policy 'dots'; known: none, full"):
        remat.check("dots")
    assert remat.check("dots_saveable") == "dots_saveable"
