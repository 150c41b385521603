"""The description of a hybrid model: one frozen, hashable, validated dataclass.

A model is a tuple of layer types, one name a layer, and one set of options for each type that
occurs. Everything else (parameter, cache and FLOP counts, Hugging Face configs) follows from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jet_jax.mixer_options import OPTIONS, build
from jet_jax.option_checks import require, require_positive

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
DTYPES = ("bfloat16", "float32")


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
            require_positive(name, getattr(self, name))
        require(self.rms_norm_eps > 0, f"rms_norm_eps={self.rms_norm_eps} must be positive")
        require(len(self.layer_types) >= 1, "layer_types is empty; name one mixer a layer")
        known = known_types()
        for i, kind in enumerate(self.layer_types):
            require(
                kind in OPTIONS, f"unknown layer type {kind!r} at layer {i}; known types: {known}"
            )
            require(
                kind in dict(self.mixers),
                f"layer {i} is {kind!r}, but mixers has no options for it "
                f"(it has: {', '.join(dict(self.mixers)) or 'none'})",
            )
        for _, options in self.mixers:
            options.check(self.hidden_size)
        require(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act {self.hidden_act!r} is not supported; use {' or '.join(ACTIVATIONS)}",
        )
        for name in ("dtype", "state_dtype"):
            value = getattr(self, name)
            require(value in DTYPES, f"{name}={value!r} is not one of {', '.join(DTYPES)}")

    @staticmethod
    def _normalise_mixers(mixers: Any) -> tuple[tuple[str, Any], ...]:
        items = dict(mixers)
        out = []
        for name in sorted(items):
            require(
                name in OPTIONS,
                f"unknown layer type {name!r} in mixers; known types: {known_types()}",
            )
            options = items[name]
            if not isinstance(options, OPTIONS[name]):
                options = build(OPTIONS[name], dict(options), f"mixers[{name!r}]")
            if name == "swa":
                require(options.window_size is not None, "mixers['swa'] needs window_size")
            if name == "attn":
                require(
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

    def is_first(self, layer: int) -> bool:
        """Whether no layer before that one is of the same type."""
        return self.layer_types[layer] not in self.layer_types[:layer]

    def mixer_params(self, layer_type: str) -> int:
        """Parameters of all mixers of that type together."""
        options = self.options(layer_type)
        return sum(
            options.param_count(self.hidden_size, self.is_first(i))
            for i, kind in enumerate(self.layer_types)
            if kind == layer_type
        )

    def param_count(self) -> int:
        """All parameters, a tied embedding counted once."""
        heads = 1 if self.tie_word_embeddings else 2
        mixers = sum(self.mixer_params(kind) for kind in set(self.layer_types))
        norms = (4 if self.use_post_norms else 2) * self.hidden_size
        mlp = 3 * self.hidden_size * self.intermediate_size
        layers = mixers + self.num_layers * (mlp + norms)
        return heads * self.vocab_size * self.hidden_size + layers + self.hidden_size

    def cache_bytes(self, context: int, batch: int = 1) -> int:
        """Bytes of the decoding cache for `batch` sequences of `context` tokens."""
        size, state = (2 if d == "bfloat16" else 4 for d in (self.dtype, self.state_dtype))
        return batch * sum(
            self.options(kind).cache_bytes(context, size, state, self.hidden_size)
            for kind in self.layer_types
        )

    def flops_per_token(self, context: int) -> float:
        """Forward FLOPs a token, averaged over a causal sequence of `context` tokens.

        A multiply-add counts as two. Training (forward and backward) takes three times as many.
        """
        dense = self.vocab_size * self.hidden_size
        mixing = 0.0
        for i, kind in enumerate(self.layer_types):
            options = self.options(kind)
            dense += options.matmul_params(self.hidden_size, self.is_first(i))
            dense += 3 * self.hidden_size * self.intermediate_size
            mixing += options.mixing_flops(context, self.hidden_size)
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
        return build(cls, values, "the model config")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any] | str) -> ModelConfig:
        """Reads a Hugging Face config, as a dict or as the text of a config.json.

        Supported model types: qwen2, qwen3, llama, gemma3_text, jet_nemotron, those of
        flash-linear-attention (retnet, gla, delta_net, gated_deltanet, kda) and jet_jax_hybrid.
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


def known_types() -> str:
    """The layer types there are, and the way to more of them, for messages."""
    return (
        f"{', '.join(OPTIONS)}; a block of your own is known once the file that registers it "
        "(jet_jax.register_mixer) is imported"
    )
