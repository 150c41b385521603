"""The options of each mixer: frozen dataclasses that check themselves and count.

Each has `check`, `param_count`, `matmul_params`, `cache_bytes` and `mixing_flops`, from which the
model's own counts follow. Attention and the JetBlock are here, the other recurrent mixers in
`linear_options`, `delta_options` and `rwkv7_options`. `OPTIONS` maps a layer type to its class.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jet_jax.delta_options import DeltaNetOptions, GDNOptions, KDAOptions
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


@dataclass(frozen=True)
class JetOptions(MixerOptions):
    """JetBlock: gated delta rule with a per-token generated short convolution on the values.

    `head_dim` is the key width K; the value width is K·expand_v. Source: Jet-Nemotron
    (arXiv 2508.15884) §3.2 and its released inference code.
    """

    num_heads: int
    head_dim: int
    expand_v: float = 2.0
    conv_size: int = 4
    generator_reduction: int = 8
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm_eps", float(self.norm_eps))
        for name in ("num_heads", "head_dim", "conv_size", "generator_reduction"):
            require_positive(name, getattr(self, name))
        require(self.conv_size >= 2, f"conv_size={self.conv_size} must be at least 2")
        for what, exact, rounded in (
            ("head_dim * expand_v", self.head_dim * self.expand_v, self.value_dim),
            ("num_heads * head_dim * expand_v", self.key_width * self.expand_v, self.value_width),
        ):
            require(
                rounded >= 1 and abs(exact - rounded) <= 1e-5 * exact,
                f"{what} = {exact} is not an integer; change head_dim={self.head_dim} or "
                f"expand_v={self.expand_v}",
            )
        require(
            self.value_width % self.generator_reduction == 0,
            f"value width {self.value_width} is not divisible by "
            f"generator_reduction={self.generator_reduction}",
        )

    @property
    def value_dim(self) -> int:
        """Value width V of one head."""
        return int(self.head_dim * self.expand_v)

    @property
    def key_width(self) -> int:
        """H·K."""
        return self.num_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """H·V."""
        return self.num_heads * self.value_dim

    @property
    def generator_width(self) -> int:
        """Hidden width R of the kernel generator."""
        return self.value_width // self.generator_reduction

    def param_count(self, hidden_size: int, first: bool = False) -> int:
        """Parameters of one mixer."""
        vectors = 2 * self.num_heads + self.value_dim + self.value_width * self.conv_size
        return self.matmul_params(hidden_size) + vectors

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        per_input = 2 * self.key_width + 3 * self.value_width + 2 * self.num_heads
        generator = self.generator_width * (hidden_size + self.conv_size * self.value_width)
        return hidden_size * per_input + generator

    def cache_bytes(
        self, context: int, dtype_bytes: int, state_bytes: int, hidden_size: int
    ) -> int:
        """Bytes of the state and the convolution tail, whatever the context."""
        state = self.num_heads * self.head_dim * self.value_dim * state_bytes
        return state + (self.conv_size - 1) * self.value_width * dtype_bytes

    def mixing_flops(self, context: int, hidden_size: int) -> float:
        """Forward FLOPs a token of the recurrence (three matrix-vector products) and the taps."""
        state = self.num_heads * self.head_dim * self.value_dim
        return float(6 * state + 2 * self.conv_size * self.value_width)


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
