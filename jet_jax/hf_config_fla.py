"""Configs of flash-linear-attention's models to ModelConfig and back.

These models have one recurrent mixer throughout, but for layers that `attn` turns into softmax
attention; blocks are RMSNorm, mixer, RMSNorm, gated MLP. Source: the configuration classes of
flash-linear-attention 0.6.0 (keys and defaults).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jet_jax.config import ModelConfig
from jet_jax.hf_values import Values, common
from jet_jax.mixer_options import OPTIONS, AttentionOptions, RopeOptions


@dataclass(frozen=True)
class _Model:
    """One architecture.

    Attributes:
      architecture: the class that a config.json names.
      layer_type: ours.
      defaults: of the configuration class, where they are not those of `_DEFAULTS`.
      keys: the options that a config may set, under their own names.
    """

    architecture: str
    layer_type: str
    defaults: dict[str, Any]
    keys: tuple[str, ...]


_RETENTION_KEYS = ("num_heads", "num_kv_heads", "expand_k", "expand_v", "use_output_gate",
                   "fuse_norm")  # fmt: skip
_VALUE_KEYS = ("head_dim", "num_heads", "num_v_heads", "expand_v", "use_short_conv", "conv_size",
               "allow_neg_eigval")  # fmt: skip
_MODELS = {
    # The published block passes no convolution on to the layer, whatever the config says.
    "retnet": _Model("RetNetForCausalLM", "retnet", {"hidden_ratio": 2}, _RETENTION_KEYS),
    "gla": _Model(
        "GLAForCausalLM",
        "gla",
        {},
        (*_RETENTION_KEYS, "use_short_conv", "conv_size", "clamp_min"),
    ),
    "delta_net": _Model(
        "DeltaNetForCausalLM",
        "deltanet",
        {"num_heads": 16},
        ("num_heads", "expand_k", "expand_v", "use_gate", "use_beta", "use_short_conv",
         "conv_size", "allow_neg_eigval", "qk_norm", "qk_activation"),
    ),
    "gated_deltanet": _Model(
        "GatedDeltaNetForCausalLM",
        "gdn",
        {"num_hidden_layers": 21},
        (*_VALUE_KEYS, "use_gate", "output_gate_activation"),
    ),
    "kda": _Model("KDAForCausalLM", "kda", {}, (*_VALUE_KEYS, "safe_gate", "lower_bound")),
}  # fmt: skip
FLA_MODEL_TYPES = tuple(_MODELS)

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "hidden_ratio": 4,
    "norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def read_fla(v: Values) -> ModelConfig:
    """Reads a config of one of `FLA_MODEL_TYPES`.

    Raises:
      ValueError: for what is not supported, by name.
    """
    model = _MODELS[v.model_type]
    v = Values(v.values, v.model_type, _DEFAULTS | model.defaults)
    for key, allowed in (
        ("hidden_act", ("swish", "silu")),
        ("attnres_block_size", ()),
        ("feature_map", ()),
        ("elementwise_affine", (True,)),
    ):
        v.refuse(key, allowed)
    hidden, layers = v.need("hidden_size"), v.need("num_hidden_layers")
    if v.get("intermediate_size") is None:
        v.values["intermediate_size"] = _mlp_width(hidden, v.need("hidden_ratio"))
    options = {key: v.get(key) for key in model.keys if v.get(key) is not None}
    options["norm_eps"] = float(v.need("norm_eps"))
    if "use_output_gate" in model.keys and v.get("hidden_act"):
        options["gate_fn"] = v.get("hidden_act")  # which these blocks pass on to the layer
    mixers = {model.layer_type: OPTIONS[model.layer_type](**options)}
    kinds = [model.layer_type] * layers
    for kind, at, attention in _attention_layers(v, hidden):
        if mixers.setdefault(kind, attention) != attention:
            raise ValueError(
                f"{v.model_type}: attn describes two different attentions "
                f"{'with' if kind == 'swa' else 'without'} a window, of which a model may have one"
            )
        for layer in at:
            kinds[layer] = kind
    return common(
        v,
        kinds,
        mixers,
        rms_norm_eps=float(v.need("norm_eps")),
        hidden_act="silu",
    )


def _mlp_width(hidden_size: int, ratio: int) -> int:
    """The MLP's width where a config names none: 2/3 of ratio·hidden, up to a multiple of 256."""
    return 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)


def _attention_layers(v: Values, hidden: int) -> list[tuple[str, list[int], AttentionOptions]]:
    """Layer type, layers and options of each entry of `attn`."""
    entries = v.get("attn") or []
    out = []
    for entry in [entries] if isinstance(entries, dict) else entries:
        for key in ("layers", "num_heads"):
            if key not in entry:
                raise ValueError(f"{v.model_type}: attn has no {key!r}")
        heads, layers = entry["num_heads"], entry["layers"]
        if hidden % heads:
            raise ValueError(
                f"{v.model_type}: hidden_size={hidden} is not divisible by attn's num_heads={heads}"
            )
        if any(not 0 <= layer < v.need("num_hidden_layers") for layer in layers):
            raise ValueError(
                f"{v.model_type}: attn names layers {layers}, but the model has "
                f"{v.need('num_hidden_layers')}"
            )
        window = entry.get("window_size")
        options = AttentionOptions(
            heads,
            entry.get("num_kv_heads") or heads,
            hidden // heads,
            qkv_bias=bool(entry.get("qkv_bias", False)),
            rope=RopeOptions(theta=float(entry.get("rope_theta") or 10000.0)),
            window_size=window,
        )
        out.append(("attn" if window is None else "swa", layers, options))
    return out


def write_fla(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """A config.json of that architecture, right only if reading it back gives `config`."""
    model = _MODELS[model_type]
    mixers = dict(config.mixers)
    if model.layer_type not in mixers:
        raise ValueError(f"{model_type} needs {model.layer_type} layers")
    options = dataclasses.asdict(mixers.pop(model.layer_type))
    entries = []
    for kind, attention in mixers.items():
        entries.append(
            {
                "layers": [i for i, name in enumerate(config.layer_types) if name == kind],
                "num_heads": attention.num_heads,
                "num_kv_heads": attention.num_kv_heads,
                "qkv_bias": attention.qkv_bias,
                "window_size": attention.window_size,
                "rope_theta": attention.rope.theta,
            }
        )
    return {
        "architectures": [model.architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "hidden_act": options.get("gate_fn", "swish"),
        "num_hidden_layers": config.num_layers,
        "norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        **{
            key: list(value) if isinstance(value, tuple) else value
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            for value in [getattr(config, key)]
        },
        **{key: options[key] for key in model.keys},
        "attn": entries or None,
        "use_cache": True,
        "torch_dtype": config.dtype,
    }
