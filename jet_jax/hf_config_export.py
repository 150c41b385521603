"""ModelConfig to a Hugging Face config.json.

A config is exported under the first architecture whose writer, read back, gives the same
ModelConfig: that equality is the only test of what an architecture can hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jet_jax.config import ModelConfig
from jet_jax.hf_config import HYBRID_MODEL_TYPE, LAYER_NAMES, READERS, from_hf
from jet_jax.hf_config_fla import FLA_MODEL_TYPES, write_fla
from jet_jax.mixer_options import RopeOptions


def _write_rope(rope: RopeOptions) -> dict[str, Any]:
    out: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": rope.theta}
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn"):
        out["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.kind == "llama3":
        out |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.kind == "yarn":
        out |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        out |= {"truncate": rope.truncate}
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(rope, key) is not None:
                out[key] = getattr(rope, key)
    return out


def _write(config: ModelConfig, model_type: str) -> dict[str, Any]:
    """A config.json of that architecture, right only if reading it back gives `config`."""
    architecture = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "llama": "LlamaForCausalLM",
        "gemma3_text": "Gemma3ForCausalLM",
        "jet_nemotron": "JetNemotronForCausalLM",
    }[model_type]
    mixers = dict(config.mixers)
    attention = mixers.get("attn") or mixers.get("swa")
    out: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": config.dtype,
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        out[key] = list(value) if isinstance(value, tuple) else value
    if attention is not None:
        out["num_attention_heads"] = attention.num_heads
        out["num_key_value_heads"] = attention.num_kv_heads
        out["head_dim"] = attention.head_dim
    names = {ours: theirs for theirs, ours in LAYER_NAMES.items()}
    if model_type == "jet_nemotron":
        if attention is None:  # attention sizes are required keys even when no layer uses them
            heads = next(h for h in (12, 8, 4, 2, 1) if config.hidden_size % h == 0)
            out |= {"num_attention_heads": heads, "num_key_value_heads": heads}
        out.pop("head_dim", None)
        out |= {"hidden_act": config.hidden_act, "layer_types": list(config.layer_types)}
        rope = attention.rope if attention is not None else RopeOptions()
        scaling = _write_rope(rope)
        out |= {"rope_theta": scaling.pop("rope_theta")}
        out |= {"rope_scaling": None if rope.kind == "default" else scaling}
        efficient: dict[str, Any] = {}
        if "jet" in mixers:
            jet = mixers["jet"]
            efficient["jet"] = {
                "mode": "chunk",
                "expand_v": jet.expand_v,
                "num_heads": jet.num_heads,
                "head_dim": jet.head_dim,
                "norm_eps": jet.norm_eps,
                "conv_size": jet.conv_size,
                "dconv_generator_reduction": jet.generator_reduction,
                "dconv_implementation": "triton",
            }
        if "swa" in mixers:
            efficient["swa"] = {"window_size": mixers["swa"].window_size}
        out["efficient_attention_config"] = efficient
        return out
    if attention is None:
        raise ValueError(f"{model_type} needs attention layers")
    out["layer_types"] = [names[kind] for kind in config.layer_types]
    if model_type == "gemma3_text":
        out["hidden_activation"] = config.hidden_act
        out["attention_bias"] = attention.qkv_bias
        out["query_pre_attn_scalar"] = round(attention.scale**-2)
        out["sliding_window"] = mixers["swa"].window_size if "swa" in mixers else 4096
        out["rope_parameters"] = {
            names[kind]: _write_rope(options.rope) for kind, options in config.mixers
        }
        return out
    out["hidden_act"] = config.hidden_act
    if model_type != "qwen2":
        out["attention_bias"] = attention.qkv_bias
    if model_type == "llama":
        del out["layer_types"]
    else:
        out["use_sliding_window"] = "swa" in mixers
        out["sliding_window"] = mixers["swa"].window_size if "swa" in mixers else None
    out["rope_parameters"] = _write_rope(attention.rope)
    return out


def _says(values: Mapping[str, Any] | str, config: ModelConfig) -> bool:
    """Whether a Hugging Face config describes this model (its number formats apart)."""
    read = from_hf(values)
    return read.replace(dtype=config.dtype, state_dtype=config.state_dtype) == config


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face config of a model; see `ModelConfig.to_hf`."""
    if config.hf_json is not None and _says(config.hf_json, config):
        return json.loads(config.hf_json)
    for model_type in READERS:
        try:
            write = write_fla if model_type in FLA_MODEL_TYPES else _write
            candidate = write(config, model_type)
            if _says(candidate, config):
                return candidate
        except (ValueError, KeyError, AttributeError):
            continue  # this architecture cannot say it
    return {
        "model_type": HYBRID_MODEL_TYPE,
        "architectures": ["HybridLM"],
        "config": config.replace(hf_json=None).to_dict(),
    }
