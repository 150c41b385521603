"""What the decoding cache consists of, in words and bytes, kind of layer by kind of layer."""

from __future__ import annotations

from collections import Counter

from jet_jax.config import ModelConfig
from jet_jax.mixer_options import AttentionOptions

MIB = 2**20


def layer_bytes(config: ModelConfig, kind: str, context: int) -> int:
    """Bytes that one layer of a kind keeps of one sequence of `context` tokens."""
    size, state = (2 if d == "bfloat16" else 4 for d in (config.dtype, config.state_dtype))
    return config.options(kind).cache_bytes(context, size, state, config.hidden_size)


def kept(config: ModelConfig, kind: str) -> str:
    """What one layer of a kind keeps of one sequence of T tokens, as a formula of elements."""
    options = config.options(kind)
    if isinstance(options, AttentionOptions):
        tokens, which = "T", "all tokens"
        if options.window_size is not None:
            tokens = str(options.window_size)
            which = f"the last {tokens} tokens"
        heads = f"{options.num_kv_heads}·{options.head_dim}"
        return f"K and V of {which}: 2·{tokens}·{heads} {config.dtype}"
    shape = options.state_shape(config.hidden_size)
    tails = options.tails(config.hidden_size)
    text = f"state {'·'.join(map(str, shape))} {config.state_dtype}"
    if tails:
        rows = ", ".join(f"{name} {n}·{width}" for name, (n, width) in tails.items())
        text += f"; last rows {rows} {config.dtype}"
    return text


def rounded_mib(config: ModelConfig, context: int) -> int:
    """The cache of one sequence in MiB when each layer's is rounded to whole MiB first.

    That gives the MB that the tables of arXiv 2508.15884 print at 64K: 154 for Jet-Nemotron-2B and
    all nine shapes of its search, 258 for 4B, 1,792 for Qwen2.5-1.5B (states in float32, all else
    in bfloat16). Neither MiB nor 10^6 bytes without the rounding give 154; that the paper rounds so
    is a guess.
    """
    counts = Counter(config.layer_types)
    return sum(n * round(layer_bytes(config, kind, context) / MIB) for kind, n in counts.items())
