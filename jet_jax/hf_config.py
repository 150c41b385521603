"""Hugging Face config.json to ModelConfig, old and new spellings: one reader an architecture.

Sources: transformers' configuration classes and rope utilities (defaults, precedence of keys);
the two config files of the Jet-Nemotron repository.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from jet_jax.config import ModelConfig
from jet_jax.hf_config_fla import FLA_MODEL_TYPES, read_fla
from jet_jax.hf_values import Values, common
from jet_jax.mixer_options import AttentionOptions, JetOptions, RopeOptions

HYBRID_MODEL_TYPE = "jet_jax_hybrid"

# Class defaults that a config.json may leave out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
    },
    "qwen3": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "llama": {
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "jet_nemotron": {
        "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 2,
    },
}


def _rope(v: Values, layer_type: str, theta_default: float, theta_key: str = "rope_theta"):
    """Rotary options of one layer type from `rope_parameters` (new) or `rope_scaling` (old)."""
    params = v.get("rope_scaling") or v.get("rope_parameters") or {}
    if any(isinstance(p, Mapping) for p in params.values()):
        params = params.get(layer_type) or {}
    kind = params.get("rope_type", params.get("type", "default"))
    if params.get("mrope_section"):
        raise ValueError(f"{v.model_type} with mrope_section (multimodal rope) is not supported")
    partial = params.get("partial_rotary_factor", v.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(
            f"{v.model_type} with partial_rotary_factor={partial} is not supported (only 1.0)"
        )
    theta = params.get("rope_theta") or v.get(theta_key, theta_default)
    if kind == "default":
        return RopeOptions(theta=float(theta))
    max_length = v.need("max_position_embeddings")
    original = v.get(
        "original_max_position_embeddings",
        params.get("original_max_position_embeddings") or max_length,
    )
    factor = params.get("factor")
    if factor is None:
        if kind != "yarn":
            raise ValueError(f"{v.model_type}: rope type {kind!r} needs a 'factor'")
        factor = max_length / original
    out: dict[str, Any] = {"theta": float(theta), "kind": kind, "factor": float(factor)}
    if kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = original
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            if key not in params:
                raise ValueError(f"{v.model_type}: rope type 'llama3' needs {key!r}")
            out[key] = float(params[key])
    if kind == "yarn":
        for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
            if params.get(key):
                out[key] = float(params[key])
        out["truncate"] = params.get("truncate", True)
    return RopeOptions(**out)


def _attention(v: Values, rope: RopeOptions, **changes: Any) -> AttentionOptions:
    heads = v.need("num_attention_heads")
    head_dim = v.get("head_dim")
    if head_dim is None:
        hidden = v.need("hidden_size")
        if hidden % heads:
            raise ValueError(
                f"hidden_size={hidden} is not divisible by num_attention_heads={heads} and the "
                "config names no head_dim"
            )
        head_dim = hidden // heads
    kv_heads = v.get("num_key_value_heads", heads)
    return AttentionOptions(heads, kv_heads, head_dim, rope=rope, **changes)


LAYER_NAMES = {"full_attention": "attn", "sliding_attention": "swa"}


def _translate(v: Values, names: Any) -> list[str]:
    for i, name in enumerate(names):
        if name not in LAYER_NAMES:
            raise ValueError(
                f"{v.model_type}: layer type {name!r} at layer {i} is not supported; "
                f"known: {', '.join(LAYER_NAMES)}"
            )
    return [LAYER_NAMES[name] for name in names]


def _read_transformers(v: Values) -> ModelConfig:
    """qwen2, qwen3 and llama: they differ in biases, q/k norm and windows."""
    v.refuse("mlp_bias", (False,))
    v.refuse("pretraining_tp", (1,))
    v.refuse("use_mrope", (False,))
    bias = bool(v.get("attention_bias", False))
    if v.model_type == "qwen2":
        changes = {"qkv_bias": True}
    elif v.model_type == "qwen3":
        changes = {"qkv_bias": bias, "o_bias": bias, "qk_norm": True}
    else:
        changes = {"qkv_bias": bias, "o_bias": bias}
    layers = v.need("num_hidden_layers")
    windowed = v.model_type != "llama" and v.get("use_sliding_window", False)
    window = v.get("sliding_window") if windowed else None
    if v.get("layer_types") is not None and v.model_type != "llama":
        kinds = _translate(v, v.need("layer_types"))
        if "swa" in kinds and window is None:
            raise ValueError(
                f"{v.model_type}: layer_types holds 'sliding_attention' but use_sliding_window "
                "is false"
            )
    elif window is not None:
        first = v.get("max_window_layers", 28)
        kinds = ["swa" if i >= first else "attn" for i in range(layers)]
    else:
        kinds = ["attn"] * layers
    mixers: dict[str, Any] = {"attn": _attention(v, _rope(v, "full_attention", 10000.0), **changes)}
    if "swa" in kinds:
        rope = _rope(v, "sliding_attention", 10000.0)
        mixers["swa"] = _attention(v, rope, window_size=window, **changes)
    return common(v, kinds, mixers)


def _read_gemma3(v: Values) -> ModelConfig:
    v.refuse("use_bidirectional_attention", (False,))
    v.refuse("attn_logit_softcapping", ())
    v.refuse("final_logit_softcapping", ())
    bias = bool(v.get("attention_bias", False))
    layers = v.need("num_hidden_layers")
    pattern = v.get("sliding_window_pattern", 6)
    names = v.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers)
    ]
    kinds = _translate(v, names)
    changes = {
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": True,
        "query_scale": float(v.need("query_pre_attn_scalar")) ** -0.5,
    }
    nested = v.get("rope_parameters")
    if nested and not any(isinstance(p, Mapping) for p in nested.values()):
        raise ValueError(
            "gemma3_text: rope_parameters must hold one entry for 'full_attention' and one for "
            "'sliding_attention'"
        )
    # An old rope_scaling speaks of the full-attention layers only, and adds to what is said there.
    local = Values({**v.values, "rope_scaling": None}, v.model_type)
    scaling = v.get("rope_scaling")
    if scaling and nested:
        scaling = {**(nested.get("full_attention") or {}), **scaling}
    full = Values({**v.values, "rope_scaling": scaling}, v.model_type)
    mixers = {
        "attn": _attention(v, _rope(full, "full_attention", 1e6), **changes),
        "swa": _attention(
            v,
            _rope(local, "sliding_attention", 1e4, "rope_local_base_freq"),
            window_size=v.need("sliding_window"),
            **changes,
        ),
    }
    return common(
        v,
        kinds,
        mixers,
        hidden_act=v.get("hidden_activation", v.get("hidden_act")),
        norm_offset=1.0,
        use_post_norms=True,
        embedding_scale=True,
    )


def _read_jet_nemotron(v: Values) -> ModelConfig:
    v.refuse("hidden_act", ("silu",))
    v.refuse("use_mrope", (False,))
    layers = v.need("num_hidden_layers")
    kinds = v.get("layer_types") or ["attn"] * layers
    if isinstance(kinds, str):
        try:
            kinds = list(ast.literal_eval(kinds))
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(
                f"jet_nemotron: layer_types={kinds!r} is not a list of layer types"
            ) from error
    efficient = v.get("efficient_attention_config", {})
    mixers: dict[str, Any] = {}
    attention = _attention(v, _rope(v, "full_attention", 1e6), qkv_bias=True)
    mixers["attn"] = attention
    if "swa" in kinds:
        window = efficient.get("swa", {}).get("window_size")
        if window is None:
            raise ValueError("jet_nemotron: efficient_attention_config.swa.window_size is missing")
        mixers["swa"] = _attention(v, attention.rope, qkv_bias=True, window_size=int(window))
    if "jet" in kinds:
        jet = efficient.get("jet")
        if jet is None:
            raise ValueError("jet_nemotron: efficient_attention_config.jet is missing")
        mixers["jet"] = JetOptions(
            num_heads=jet.get("num_heads", 6),
            head_dim=jet.get("head_dim", 256),
            expand_v=float(jet.get("expand_v", 2.0)),
            conv_size=jet.get("conv_size", 4),
            generator_reduction=jet.get("dconv_generator_reduction", 8),
            norm_eps=float(jet.get("norm_eps", 1e-5)),
        )
    return common(v, list(kinds), mixers)


READERS = {
    "qwen2": _read_transformers,
    "qwen3": _read_transformers,
    "llama": _read_transformers,
    "gemma3_text": _read_gemma3,
    "jet_nemotron": _read_jet_nemotron,
    **dict.fromkeys(FLA_MODEL_TYPES, read_fla),
}


def from_hf(values: Mapping[str, Any] | str) -> ModelConfig:
    """Reads a Hugging Face config; see `ModelConfig.from_hf`."""
    text = values if isinstance(values, str) else json.dumps(dict(values), indent=2)
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"the config is a JSON {type(parsed).__name__}, expected an object")
    model_type = parsed.get("model_type")
    if model_type == HYBRID_MODEL_TYPE:
        if not isinstance(parsed.get("config"), dict):
            raise ValueError(f"the {HYBRID_MODEL_TYPE} config has no 'config'")
        return ModelConfig.from_dict(parsed["config"]).replace(hf_json=text)
    if model_type not in READERS:
        known = ", ".join([*READERS, HYBRID_MODEL_TYPE])
        raise ValueError(f"model_type {model_type!r} is not supported; supported: {known}")
    return READERS[model_type](Values(parsed, model_type, _DEFAULTS.get(model_type))).replace(
        hf_json=text
    )
