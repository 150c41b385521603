"""A tiny teacher and its supernet: 4 layers of attention, 2 KV heads for 4 heads, 61 tokens."""

from functools import cache

import jax
from flax import nnx

from jet_jax.config import ModelConfig
from jet_jax.models.lm import HybridLM
from jet_jax.params import split
from jet_jax.postnas.supernet import Supernet, stack

KIND, OPTIONS = "gla", {"num_heads": 4, "expand_k": 1.0, "expand_v": 1.0, "gate_low_rank_dim": 4}


def teacher_config(**changes) -> ModelConfig:
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": True}
    fields = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": ("attn",) * 4,
        "mixers": {"attn": attention},
        "initializer_range": 0.2,
        "dtype": "float32",
    }
    return ModelConfig(**(fields | changes))


@cache
def teacher() -> HybridLM:
    return HybridLM(teacher_config(), rngs=nnx.Rngs(0))


@cache
def supernet(window: int | None = 5) -> Supernet:
    return Supernet.of(teacher_config(), KIND, OPTIONS, window)


@cache
def params() -> dict:
    net = supernet()
    linear = jax.jit(net.random_linear)(jax.random.key(1))
    return {"teacher": stack(split(teacher())[1]), "linear": linear}
