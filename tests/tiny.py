"""A tiny hybrid whose sizes do not divide: 257 tokens, 3 jet heads, 2 KV heads."""

import numpy as np

from jet_jax.config import ModelConfig


def tiny_config(**changes) -> ModelConfig:
    """One layer of each type: jet, attn, swa; about 60,000 parameters, float32."""
    attention = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "qkv_bias": True}
    fields = {
        "vocab_size": 257,
        "hidden_size": 48,
        "intermediate_size": 80,
        "layer_types": ("jet", "attn", "swa"),
        "mixers": {
            "attn": attention,
            "swa": attention | {"window_size": 7},
            "jet": {"num_heads": 3, "head_dim": 8, "generator_reduction": 4},
        },
        "dtype": "float32",
    }
    return ModelConfig(**(fields | changes))


def run_compiled(function, *args):
    """Calls a jitted function compiled without LLVM's optimizations: a third of the time."""
    compiled = function.lower(*args).compile({"xla_backend_optimization_level": 0})
    return compiled(*args)


def random_batch(seed: int, rows: int, length: int, vocab: int = 257) -> dict[str, np.ndarray]:
    """A packed batch: two segments and some padding in each row, padding not in the loss."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    border = rng.integers(2, length - 4, (rows, 1))
    end = rng.integers(length - 3, length + 1, (rows, 1))
    at = np.arange(length)[None]
    segment_ids = np.where(at < border, 1, np.where(at < end, 2, 0)).astype(np.int32)
    positions = np.where(at < border, at, np.where(at < end, at - border, 0)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_mask": (segment_ids != 0).astype(np.float32),
    }
