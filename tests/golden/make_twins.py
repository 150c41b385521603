"""Writes small random models and their float64 outputs, computed by transformers and PyTorch.

usage: python make_twins.py OUT [NAME ...]     (default: all of `VARIANTS`)

Needs torch and transformers, in an environment of its own: `pip install torch transformers`. The
project itself never needs torch. Each variant is a config.json as one finds it on disk, in the old
or the new spelling, which transformers reads; weights are random float32, large enough that every
rotation, window and bias shows in the logits; outputs are computed in float64 from them and rounded
once to float32. Arrays as in README.md beside this file. `COMMITTED` names the ones kept in
tests/golden/twins.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
QWEN2 = BASE | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = BASE | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12}
LLAMA = BASE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
GEMMA = BASE | {
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "head_dim": 8,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 4,
    "sliding_window": 7,
    "query_pre_attn_scalar": 24,
}


def yarn(**more: Any) -> dict[str, Any]:
    """A yarn block that extends 16 tokens; the keys given win."""
    return {"rope_type": "yarn", "original_max_position_embeddings": 16, **more}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # Qwen 2: spelling, windows, rope kinds.
    "qwen2_old_theta": QWEN2 | {"rope_theta": 500000.0, "tie_word_embeddings": True},
    "qwen2_no_theta": QWEN2 | {"tie_word_embeddings": False},
    "qwen2_window": QWEN2
    | {
        "rope_theta": 1e6,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
    },
    "qwen2_window_all": QWEN2
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "qwen2_window_unused": QWEN2
    | {"use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0},
    "qwen2_window_types": QWEN2
    | {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 28,
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen2_window_null": QWEN2
    | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "qwen2_old_linear": QWEN2
    | {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 3.0}},
    "qwen2_new_linear": QWEN2
    | {"rope_parameters": {"rope_type": "linear", "rope_theta": 2e4, "factor": 2.5}},
    "qwen2_old_yarn": QWEN2
    | {
        "rope_theta": 1e5,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "qwen2_yarn_no_factor": QWEN2 | {"rope_theta": 1e5, "rope_scaling": yarn(factor=None)},
    "qwen2_yarn_no_factor_new": QWEN2 | {"rope_parameters": yarn(rope_theta=1e5, factor=None)},
    "qwen2_yarn_factor_wins": QWEN2 | {"rope_parameters": yarn(rope_theta=1e5, factor=2.0)},
    "qwen2_yarn_no_original": QWEN2
    | {"rope_theta": 1e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "qwen2_yarn_attention_factor": QWEN2
    | {"rope_parameters": yarn(rope_theta=1e5, factor=4.0, attention_factor=0.7)},
    "qwen2_yarn_betas": QWEN2
    | {"rope_parameters": yarn(rope_theta=1e5, factor=4.0, beta_fast=8, beta_slow=0.5)},
    "qwen2_yarn_mscale": QWEN2
    | {
        "rope_parameters": yarn(rope_theta=1e5, factor=4.0, mscale=0.7, mscale_all_dim=1.3),
    },
    "qwen2_yarn_mscale_only": QWEN2
    | {"rope_parameters": yarn(rope_theta=1e5, factor=4.0, mscale=0.7)},
    "qwen2_yarn_no_truncate": QWEN2
    | {"rope_parameters": yarn(rope_theta=1e5, factor=4.0, truncate=False)},
    "qwen2_yarn_original_outside": QWEN2
    | {
        "rope_theta": 1e5,
        "original_max_position_embeddings": 24,
        "rope_scaling": yarn(factor=4.0),
    },
    "qwen2_llama3": QWEN2 | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "qwen2_head_dim": QWEN2 | {"head_dim": 12, "tie_word_embeddings": True},
    "qwen2_no_kv_heads": {k: v for k, v in QWEN2.items() if k != "num_key_value_heads"}
    | {"num_attention_heads": 32, "hidden_size": 64},
    # Qwen 3.
    "qwen3_bias": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3_window": QWEN3
    | {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
        "rope_theta": 1e6,
    },
    "qwen3_old_yarn": QWEN3
    | {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    | {"max_position_embeddings": 40},
    "qwen3_default_head_dim": {k: v for k, v in QWEN3.items() if k != "head_dim"},
    # Llama.
    "llama_bias": LLAMA | {"attention_bias": True, "rope_theta": 1e4},
    "llama_head_dim": LLAMA | {"head_dim": 14, "tie_word_embeddings": True},
    "llama_linear": LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "llama_old_llama3": LLAMA | {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE},
    "llama_yarn": LLAMA | {"rope_parameters": yarn(rope_theta=1e4, factor=8.0)},
    "llama_mha": LLAMA | {"num_key_value_heads": None, "rms_norm_eps": 1e-3},
    "llama_gelu": LLAMA | {"hidden_act": "gelu_pytorch_tanh", "eos_token_id": [2, 3]},
    # Gemma 3.
    "gemma3_old": GEMMA
    | {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window_pattern": 3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_old_default_pattern": GEMMA | {"num_hidden_layers": 8, "rope_theta": 5e5},
    "gemma3_old_local": GEMMA | {"rope_local_base_freq": 300.0, "sliding_window_pattern": 2},
    "gemma3_new": GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 3e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e3},
        },
    },
    "gemma3_new_yarn": GEMMA
    | {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "full_attention": yarn(factor=4.0, rope_theta=3e5),
            "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e3},
        },
    },
    "gemma3_bias_untied": GEMMA
    | {"attention_bias": True, "tie_word_embeddings": False, "sliding_window_pattern": 2},
    "gemma3_mixed_spelling": GEMMA
    | {
        "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 3e5}},
        "rope_scaling": {"factor": 4.0},
        "rope_local_base_freq": 500.0,
        "sliding_window_pattern": 2,
    },
    "gemma3_silu": GEMMA | {"hidden_activation": "silu", "sliding_window_pattern": 2},
    "gemma3_all_full": GEMMA | {"layer_types": ["full_attention"] * 4},
    "gemma3_all_sliding": GEMMA | {"layer_types": ["sliding_attention"] * 4},
}
COMMITTED = ("qwen2_window", "qwen2_yarn_no_factor", "qwen3_bias", "llama_bias", "gemma3_old")

LENGTH, PREFILL, GREEDY_PROMPT, GREEDY, PADDED = 40, 29, 30, 10, 18


def randomise(model: Any, gemma: bool, generator: Any) -> None:
    """Draws every parameter so that it matters: no zero biases, no norms of exactly one."""
    import torch

    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if "norm" in name:
            p.data = 0.3 * noise + (0.0 if gemma else 1.0)
        elif p.ndim == 1:
            p.data = 0.3 * noise
        elif "embed" in name:
            p.data = noise * (p.shape[1] ** -0.5 if gemma else 1.0)
        else:
            p.data = 1.5 * noise * p.shape[1] ** -0.5


def outputs(model: Any, vocab: int, seed: int) -> dict[str, np.ndarray]:
    """Runs the model, already in float64, and returns the arrays of expected.npz."""
    import torch

    rng = np.random.default_rng(seed)
    ids = torch.tensor(rng.integers(3, vocab, (2, LENGTH)))
    full = model(ids, output_hidden_states=True, use_cache=False)
    step = model(ids[:, :PREFILL], use_cache=True)
    incremental = [step.logits[:, -1]]
    for t in range(PREFILL, LENGTH):
        step = model(ids[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
        incremental.append(step.logits[:, -1])
    sequence = ids[:, :GREEDY_PROMPT]
    for _ in range(GREEDY):
        best = model(sequence, use_cache=False).logits[:, -1].argmax(-1)
        sequence = torch.cat([sequence, best[:, None]], dim=1)
    mask = torch.ones(2, PADDED, dtype=torch.long)
    mask[1, :6] = 0
    padded = torch.where(mask == 1, torch.tensor(rng.integers(3, vocab, (2, PADDED))), 0)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # Eager attention gives NaN where a whole row of the mask is hidden.
    model.set_attn_implementation("sdpa")
    padded_logits = model(
        padded, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits
    out = {
        "input_ids": ids,
        "logits": full.logits.float(),
        "hidden_states": torch.stack(full.hidden_states).float(),
        "prefill_len": torch.tensor(PREFILL),
        "incremental_logits": torch.stack(incremental, 1).float(),
        "greedy_prompt_len": torch.tensor(GREEDY_PROMPT),
        "greedy_tokens": sequence[:, GREEDY_PROMPT:],
        "padded_input_ids": padded,
        "attention_mask": mask,
        "padded_logits": torch.where(mask[..., None] == 1, padded_logits, 0.0).float(),
    }
    assert all(torch.isfinite(a).all() for a in out.values())
    return {name: a.numpy() for name, a in out.items()}


def main(out: str, names: list[str]) -> None:
    """Writes config.json, model.safetensors and expected.npz for each name."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_grad_enabled(False)
    for name in names or VARIANTS:
        values, seed = VARIANTS[name], zlib.crc32(name.encode())
        folder = Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(values | {"dtype": "float32"}, indent=1))
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32
        ).eval()
        randomise(model, "gemma" in name, torch.Generator().manual_seed(seed))
        tied = model.lm_head.weight is model.model.embed_tokens.weight
        weights = {k: v for k, v in model.state_dict().items() if not (tied and "lm_head" in k)}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        np.savez_compressed(
            folder / "expected.npz", **outputs(model.double(), values["vocab_size"], seed)
        )
        print(name, "tied" if tied else "untied", getattr(config, "layer_types", None), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
