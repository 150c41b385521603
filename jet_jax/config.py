"""The description of a hybrid model: one frozen, hashable, validated dataclass.

A model is a tuple of layer types, one name a layer, and one set of options for each type that
occurs. Everything else (parameter, cache and FLOP counts, Hugging Face configs) follows from it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
DTYPES = ("bfloat16", "float32")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_positive(name: str, value: Any) -> None:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{name}={value!r} must be an integer of at least 1",
    )


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
        _require(
            self.kind in ROPE_TYPES,
            f"rope type {self.kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}",
        )
        _require(self.theta > 0, f"rope theta={self.theta} must be positive")
        _require(self.factor > 0, f"rope factor={self.factor} must be positive")
        if self.kind in ("llama3", "yarn"):
            _require(
                bool(self.original_max_position_embeddings),
                f"rope type {self.kind!r} needs original_max_position_embeddings",
            )


@dataclass(frozen=True)
class AttentionOptions:
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
        if isinstance(self.rope, Mapping):
            object.__setattr__(self, "rope", _build(RopeOptions, self.rope, "rope"))
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            _require_positive(name, getattr(self, name))
        _require(
            self.num_heads % self.num_kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
            "query heads are shared evenly among the key/value heads",
        )
        _require(
            self.head_dim % 2 == 0,
            f"head_dim={self.head_dim} is odd; rotary embedding pairs the two halves of a head",
        )
        if self.window_size is not None:
            _require_positive("window_size (the token itself counts)", self.window_size)

    @property
    def scale(self) -> float:
        """The factor on the attention scores."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def param_count(self, hidden_size: int) -> int:
        """Parameters of one mixer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        biases = (q + 2 * kv) * self.qkv_bias + hidden_size * self.o_bias
        return hidden_size * (2 * q + 2 * kv) + biases + 2 * self.head_dim * self.qk_norm

    def matmul_params(self, hidden_size: int) -> int:
        """Weights that every token multiplies."""
        return 2 * hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    def cache_bytes(self, context: int, dtype_bytes: int, state_bytes: int) -> int:
        """Bytes of keys and values that one sequence of `context` tokens keeps."""
        kept = context if self.window_size is None else self.window_size  # the window is a ring
        return 2 * kept * self.num_kv_heads * self.head_dim * dtype_bytes

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs a token beyond the projections, averaged over a causal sequence."""
        w = context if self.window_size is None else min(self.window_size, context)
        seen = w - w * (w - 1) / (2 * context)  # mean number of visible keys
        return 4 * self.num_heads * self.head_dim * seen


@dataclass(frozen=True)
class JetOptions:
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
            _require_positive(name, getattr(self, name))
        _require(self.conv_size >= 2, f"conv_size={self.conv_size} must be at least 2")
        for what, exact, rounded in (
            ("head_dim * expand_v", self.head_dim * self.expand_v, self.value_dim),
            ("num_heads * head_dim * expand_v", self.key_width * self.expand_v, self.value_width),
        ):
            _require(
                rounded >= 1 and abs(exact - rounded) <= 1e-5 * exact,
                f"{what} = {exact} is not an integer; change head_dim={self.head_dim} or "
                f"expand_v={self.expand_v}",
            )
        _require(
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

    def param_count(self, hidden_size: int) -> int:
        """Parameters of one mixer."""
        vectors = 2 * self.num_heads + self.value_dim + self.value_width * self.conv_size
        return self.matmul_params(hidden_size) + vectors

    def matmul_params(self, hidden_size: int) -> int:
        """Weights that every token multiplies."""
        per_input = 2 * self.key_width + 3 * self.value_width + 2 * self.num_heads
        generator = self.generator_width * (hidden_size + self.conv_size * self.value_width)
        return hidden_size * per_input + generator

    def cache_bytes(self, context: int, dtype_bytes: int, state_bytes: int) -> int:
        """Bytes of the state and the convolution tail, whatever the context."""
        state = self.num_heads * self.head_dim * self.value_dim * state_bytes
        return state + (self.conv_size - 1) * self.value_width * dtype_bytes

    def mixing_flops(self, context: int) -> float:
        """Forward FLOPs a token of the recurrence (three matrix-vector products) and the taps."""
        state = self.num_heads * self.head_dim * self.value_dim
        return float(6 * state + 2 * self.conv_size * self.value_width)


OPTIONS: dict[str, type] = {
    "attn": AttentionOptions,
    "swa": AttentionOptions,
    "jet": JetOptions,
}


def _build(cls: type, values: Mapping[str, Any], where: str) -> Any:
    """`cls(**values)` with an error that names an unknown key and the nearest known one."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            raise ValueError(f"unknown key {key!r} in {where}; {hint}")
    if isinstance(values.get("rope"), Mapping):
        values = {**values, "rope": _build(RopeOptions, values["rope"], f"{where}['rope']")}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


@dataclass(frozen=True)
class ModelConfig:
    """A hybrid language model, wholly described.

    `layer_types` names the mixer of each layer; `mixers` maps each name to its options (a mapping
    of mappings is accepted and kept as a sorted tuple, so that the config stays hashable). `dtype`
    is the compute dtype; parameters keep their own. `hf_json` is the text of the Hugging Face
    config that this one was read from, for a verbatim export; it takes no part in equality.

    Raises:
      ValueError: for an unknown layer type or key, or sizes that do not fit, naming both.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    mixers: Any
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    initializer_range: float = 0.02
    norm_offset: float = 0.0
    use_post_norms: bool = False
    embedding_scale: bool = False
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    hf_json: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("layer_types", tuple(self.layer_types))
        put("mixers", self._normalise_mixers(self.mixers))
        if isinstance(self.eos_token_id, list | tuple):
            put("eos_token_id", tuple(self.eos_token_id))
        for name in ("vocab_size", "hidden_size", "intermediate_size"):
            _require_positive(name, getattr(self, name))
        _require(self.rms_norm_eps > 0, f"rms_norm_eps={self.rms_norm_eps} must be positive")
        _require(len(self.layer_types) >= 1, "layer_types is empty; name one mixer a layer")
        known = ", ".join(OPTIONS)
        for i, kind in enumerate(self.layer_types):
            _require(
                kind in OPTIONS, f"unknown layer type {kind!r} at layer {i}; known types: {known}"
            )
            _require(
                kind in dict(self.mixers),
                f"layer {i} is {kind!r}, but mixers has no options for it "
                f"(it has: {', '.join(dict(self.mixers)) or 'none'})",
            )
        _require(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act {self.hidden_act!r} is not supported; use {' or '.join(ACTIVATIONS)}",
        )
        for name in ("dtype", "state_dtype"):
            value = getattr(self, name)
            _require(value in DTYPES, f"{name}={value!r} is not one of {', '.join(DTYPES)}")

    @staticmethod
    def _normalise_mixers(mixers: Any) -> tuple[tuple[str, Any], ...]:
        items = dict(mixers)
        out = []
        for name in sorted(items):
            _require(
                name in OPTIONS,
                f"unknown layer type {name!r} in mixers; known types: {', '.join(OPTIONS)}",
            )
            options = items[name]
            if not isinstance(options, OPTIONS[name]):
                options = _build(OPTIONS[name], dict(options), f"mixers[{name!r}]")
            if name == "swa":
                _require(options.window_size is not None, "mixers['swa'] needs window_size")
            if name == "attn":
                _require(
                    options.window_size is None,
                    "mixers['attn'] is full attention and takes no window_size; use 'swa'",
                )
            out.append((name, options))
        return tuple(out)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return len(self.layer_types)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The end-of-sequence ids as a tuple, empty when there are none."""
        ids = self.eos_token_id
        return () if ids is None else ids if isinstance(ids, tuple) else (ids,)

    def options(self, layer_type: str) -> Any:
        """The options of one layer type. Raises ValueError when the config has none for it."""
        for name, options in self.mixers:
            if name == layer_type:
                return options
        raise ValueError(f"this config has no options for layer type {layer_type!r}")

    def layer_params(self, layer_type: str) -> int:
        """Parameters of one decoder layer of that type: mixer, MLP and norms."""
        norms = (4 if self.use_post_norms else 2) * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        return self.options(layer_type).param_count(self.hidden_size) + mlp + norms

    def param_count(self) -> int:
        """All parameters, a tied embedding counted once."""
        heads = 1 if self.tie_word_embeddings else 2
        layers = sum(self.layer_params(kind) for kind in self.layer_types)
        return heads * self.vocab_size * self.hidden_size + layers + self.hidden_size

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes of the decoding cache for `batch` sequences of `context` tokens."""
        size, state = (2 if d == "bfloat16" else 4 for d in (self.dtype, self.state_dtype))
        return batch * sum(
            self.options(kind).cache_bytes(context, size, state) for kind in self.layer_types
        )

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs a token, averaged over a causal sequence of `context` tokens.

        A multiply-add counts as two. Training (forward and backward) takes three times as many.
        """
        dense = self.vocab_size * self.hidden_size
        mixing = 0.0
        for kind in self.layer_types:
            options = self.options(kind)
            dense += options.matmul_params(self.hidden_size)
            dense += 3 * self.hidden_size * self.intermediate_size
            mixing += options.mixing_flops(context)
        return 2 * dense + mixing

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dict; `from_dict` gives the same config back, `hf_json` included."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        out["mixers"] = {name: dataclasses.asdict(options) for name, options in self.mixers}
        for key, value in out.items():
            if isinstance(value, tuple):
                out[key] = list(value)
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError naming an unknown or missing key."""
        # JSON has no tuples.
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return _build(cls, values, "the model config")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any] | str) -> ModelConfig:
        """Reads a Hugging Face config, as a dict or as the text of a config.json.

        Supported model types: qwen2, qwen3, llama, gemma3_text, jet_nemotron and jet_jax_hybrid.
        Raises ValueError naming what is not supported.
        """
        from jet_jax import hf_config

        return hf_config.from_hf(values)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face config of this model: the original values where nothing changed.

        A hybrid that no published architecture holds gets the model_type jet_jax_hybrid.
        """
        from jet_jax import hf_config_export

        return hf_config_export.to_hf(self)
