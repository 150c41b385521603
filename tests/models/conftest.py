"""One small hybrid for the tests of whole models."""

import jax
import pytest
from flax import nnx
from tiny import tiny_config

from jet_jax.models.lm import HybridLM


@pytest.fixture(scope="session")
def hybrid():
    """jet, swa, attn; weights large enough that every token matters to later ones."""
    config = tiny_config(layer_types=("jet", "swa", "attn"), initializer_range=0.2)
    model = HybridLM(config, rngs=nnx.Rngs(1))
    generator = model.layers[0].mixer.generator
    # Zero in a fresh model, whose taps are static.
    generator.w2[...] = 0.1 * jax.random.normal(jax.random.key(2), generator.w2.shape)
    return model
