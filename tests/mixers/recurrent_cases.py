"""Small mixers of each recurrent layer type, with weights that make every part matter."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jet_jax.config import ModelConfig
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Place
from jet_jax.params import flatten, split, unflatten

WIDTH = 24
SMALL = {
    "retnet": {"num_heads": 3, "use_short_conv": True},
    "gla": {"num_heads": 3, "gate_low_rank_dim": 5},
    "deltanet": {"num_heads": 3},
    "gdn": {"num_heads": 3, "head_dim": 8, "expand_v": 1.5},
    "mamba2": {"head_dim": 8, "state_size": 6},
    "rwkv7": {"head_dim": 8, "gate_low_rank_dim": 5},
    "kda": {"num_heads": 3, "head_dim": 8},
    # Every kind of convolution, each on another row; the released block is in tests/models.
    "jet": {"num_heads": 3, "head_dim": 8, "expand_v": 1.5, "conv_size": 3,
            "generator_reduction": 4, "dynamic": ("query", "value"), "static": ("key",),
            "use_gate": False},
}  # fmt: skip


def make(kind: str, options: dict, first: bool = True):
    """Config, structure and weights of one mixer; weights in float32 and of order 1."""
    config = ModelConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=8,
        layer_types=(kind,) * 2,
        mixers={kind: options},
        dtype="float32",
    )
    place = Place(0 if first else 1, first)
    mixer = nnx.eval_shape(
        lambda: MIXERS[kind](config, config.options(kind), rngs=nnx.Rngs(0), place=place)
    )
    graphdef, shapes = split(mixer)
    rng = np.random.default_rng(1)
    weights = {
        path: draw(rng, path.rsplit(".", 1)[-1], shape.shape)
        for path, shape in flatten(shapes).items()
    }
    return config, graphdef, unflatten(weights)


def draw(rng, name, shape):
    """A fresh model's gates, norms and projections are too regular to show mistakes."""
    noise = rng.standard_normal(shape)
    if name in ("scale", "k_k", "k_a", "D"):
        out = 1 + 0.2 * noise
    elif name in ("kernel", "taps"):
        out = noise / np.sqrt(shape[0])
    elif name.startswith("x_"):
        out = rng.uniform(size=shape)
    else:
        out = 0.5 * noise
    return jnp.asarray(out, jnp.float32)


def relative(ours, expected) -> float:
    """Relative L2 error."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def random(seed: int, *shape: int):
    return jax.random.normal(jax.random.key(seed), shape)
