"""Models with a part of them switched off, to see what that part does."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from jet_jax.config import ModelConfig
from jet_jax.models.lm import HybridLM
from jet_jax.params import flatten, split, unflatten

ATTENTION = ("attn", "swa")  # layer types that keep a cache of keys and values
OUTPUTS = ("o_proj", "out_proj")  # what mixers call their output projection


def linear_layers(config: ModelConfig) -> list[int]:
    """The numbers of the layers whose mixer is recurrent.

    Raises:
      ValueError: there are none.
    """
    found = [i for i, kind in enumerate(config.layer_types) if kind not in ATTENTION]
    if not found:
        kinds = ", ".join(sorted(set(config.layer_types)))
        raise ValueError(f"the model has no linear-attention layer to switch off, only {kinds}")
    return found


def without_linear(model: HybridLM) -> HybridLM:
    """The model with every recurrent mixer's output replaced by zeros.

    Attention and window layers, norms and MLPs stay as they are. The output projections of the
    mixers are zeros; all other weights are shared with the model, whose programs serve it too.

    Raises:
      ValueError: the model has no recurrent mixer.
    """
    layers = linear_layers(model.config)
    graphdef, params = split(model)
    flat = flatten(params)
    for i in layers:
        ours = [
            name
            for output in OUTPUTS
            for name in flat
            if name.startswith(f"layers.{i}.mixer.{output}.")
        ]
        assert ours, f"layer {i} has no output projection"
        flat |= {name: jnp.zeros_like(flat[name]) for name in ours}
    return nnx.merge(graphdef, unflatten(flat))
