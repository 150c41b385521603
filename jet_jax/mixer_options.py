"""The options of each mixer: frozen dataclasses that check themselves and count.

Each has `check`, `param_count`, `matmul_params`, `cache_bytes` and `mixing_flops`, from which the
model's own counts follow. Attention is here, the recurrent mixers in `jet_options`,
`linear_options`, `delta_options` and `rwkv7_options`. `OPTIONS` maps a layer type to its class.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jet_jax.delta_options import DeltaNetOptions, GDNOptions, KDAOptions
from jet_jax.jet_options import JetOptions
from jet_jax.linear_options import GLAOptions, Mamba2Options, RetNetOptions
from jet_jax.option_checks import MixerOptions, require, require_positive
from jet_jax.rwkv7_options import RWKV7Options

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RopeOptions:
    """Rotary position embedding: base, scaling kind and its numbers.

    `kind` is one of "default", "linear", "llama3", "yarn". Where a Hugging Face config of the kind
    yarn names no factor, `from_hf` fills in the ratio of the model's maximum length to
    `original_max_position_embeddings`.
    Source: transformers' rope parameters (names kept); YaRN arXiv 2309.00071.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        require(
            self.kind in ROPE_TYPES,
            f"rope type {self.kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}",
        )
        require(self.theta > 0, f"rope theta={self.theta} must be positive")
        require(self.factor > 0, f"rope factor={self.factor} must be positive")
        if self.kind in ("llama3", "yarn"):
            require(
                bool(self.original_max_position_embeddings),
                f"rope type {self.kind!r} needs original_max_position_embeddings",
            )


@dataclass(frozen=True)
class AttentionOptions(MixerOptions):
    """Grouped-query softmax attention; with `window_size` = w a token sees exactly w keys.

    `query_scale` multiplies the scores and is head_dim**-0.5 when None (Gemma sets its own).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    rope: RopeOptions = field(default_factory=RopeOptions)
    query_scale: float | None = None
    window_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            require_positive(name, getattr(self, name))
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
            "query heads are shared evenly among the key/value heads",
        )
        require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} is odd; rotary embedding pairs the two halves of a head",
        )
        if self.window_size is not None:
            require_positive("window_size (the token itself counts)", self.window_size)

    @property
    def scale(self) -> float:
        """The factor on the attention scores."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def param_count(self, hidden_size: int, first: bool = False) -> int:
        """Parameters of one mixer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = (q + 2 * kv) * self.qkv_bias + hidden_size * self.o_bias
        return hidden_size * (2 * q + 2 * kv) + biases + 2 * self.head_dim * self.qk_norm

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    def cache_bytes(
        self, context: int, dtype_bytes: int, state_bytes: int, hidden_size: int
    ) -> int:
        """Bytes of keys and values that one sequence of `context` tokens keeps."""
        kept = context if self.window_size is None else self.window_size  # the window is a ring
        return 2 * kept * self.num_kv_heads * self.head_dim * dtype_bytes

    def mixing_flops(self, context: int, hidden_size: int) -> float:
        """Forward FLOPs a token beyond the projections, averaged over a causal sequence."""
        w = context if self.window_size is None else min(self.window_size, context)
        seen = w - w * (w - 1) / (2 * context)  # mean number of visible keys
        return 4 * self.num_heads * self.head_dim * seen


OPTIONS: dict[str, type] = {
    "attn": AttentionOptions,
    "swa": AttentionOptions,
    "jet": JetOptions,
    "retnet": RetNetOptions,
    "gla": GLAOptions,
    "deltanet": DeltaNetOptions,
    "gdn": GDNOptions,
    "mamba2": Mamba2Options,
    "rwkv7": RWKV7Options,
    "kda": KDAOptions,
}


def build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """`cls(**values)` with an error that names an unknown key and the nearest known one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r} in {where}; {hint}")
    if isinstance(values.get("rope"), Mapping):
        values = {**values, "rope": build(RopeOptions, values["rope"], f"{where}['rope']")}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
