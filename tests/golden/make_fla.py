"""Writes small random models of flash-linear-attention and what it computes with them.

usage: python make_fla.py OUT [NAME ...]     (default: all of `VARIANTS`)

Needs, in an environment of its own, torch, transformers, triton and flash-linear-attention; on a
machine without a GPU set TRITON_INTERPRET=1 (torch 2.13.0, transformers 5.23.0, triton 3.5.1 and
flash-linear-attention 0.6.0 were used, numpy 2.2). The project itself needs none of them. Weights
are random float32, large enough that every gate, decay, tap and bias shows in the logits; outputs
are flash-linear-attention's own in float32, through its kernels that go token by token. Arrays as
in README.md beside this file.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton.runtime.autotuner

BASE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "max_position_embeddings": 128,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "retnet": ("retnet", {"num_kv_heads": 1}),
    "gla": (
        "gla",
        {"expand_k": 1.0, "use_short_conv": True, "fuse_norm": False, "clamp_min": -0.08},
    ),
    "delta_net": (
        "delta_net",
        {"use_gate": True, "allow_neg_eigval": True, "tie_word_embeddings": True},
    ),
    "gated_deltanet": ("gated_deltanet", {"head_dim": 8, "num_v_heads": 4, "norm_eps": 1e-5}),
    "kda": ("kda", {"head_dim": 8, "expand_v": 1.5, "intermediate_size": None, "hidden_ratio": 1}),
}
LENGTH, PREFILL = 13, 6


def build(model_type: str, changes: dict[str, Any], seed: int) -> torch.nn.Module:
    """A model with random weights of a size that matters."""
    module = importlib.import_module(f"fla.models.{model_type}")
    names = {name[-8:]: name for name in module.__all__}  # "…NetConfig", "…ausalLM"
    config_class = next(n for n in names.values() if n.endswith("Config"))
    model_class = next(n for n in names.values() if n.endswith("ForCausalLM"))
    model = getattr(module, model_class)(getattr(module, config_class)(**(BASE | changes))).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = rng.standard_normal(weight.shape)
            if name.endswith("norm.weight") or "norm_swish" in name:
                value = 1 + 0.2 * noise
            elif name.endswith(("A_log", "dt_bias")):
                continue  # decays of the published sizes
            elif name.endswith("bias") or "conv1d" in name:
                value = 0.5 * noise
            elif "embeddings" in name:
                value = noise
            else:
                value = noise / np.sqrt(weight.shape[-1])
            weight.copy_(torch.from_numpy(value.astype(np.float32)))
    return model


def record(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Logits and hidden states, of whole rows and token by token, and of left-padded rows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, BASE["vocab_size"], (2, LENGTH))
    tokens = torch.from_numpy(ids)
    out: dict[str, Any] = {"input_ids": ids.astype(np.int32), "prefill_len": np.int32(PREFILL)}
    with torch.no_grad():
        whole = model(tokens, output_hidden_states=True, use_cache=False)
        out["logits"] = whole.logits
        out["hidden_states"] = torch.stack(whole.hidden_states)
        cache, steps = None, []
        for start, stop in [(0, PREFILL)] + [(t, t + 1) for t in range(PREFILL, LENGTH)]:
            part = model(tokens[:, start:stop], past_key_values=cache, use_cache=True)
            cache = part.past_key_values
            steps.append(part.logits[:, -1])
        out["incremental_logits"] = torch.stack(steps, dim=1)
        mask = np.ones_like(ids)
        mask[0, :4] = 0
        padded = np.where(mask, ids, 0)
        out["padded_input_ids"], out["attention_mask"] = padded.astype(np.int32), mask
        out["padded_logits"] = model(
            torch.from_numpy(padded), attention_mask=torch.from_numpy(mask), use_cache=False
        ).logits
    return {k: v.numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for k, v in out.items()}


def first_config(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of tuning, for which an interpreter has no clock."""
    self.nargs = None
    return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def main() -> None:
    triton.runtime.autotuner.Autotuner.run = first_config
    out, *names = sys.argv[1:]
    for name in names or VARIANTS:
        model_type, changes = VARIANTS[name]
        seed = zlib.crc32(name.encode())
        model = build(model_type, changes, seed)
        folder = Path(out) / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        np.savez_compressed(folder / "expected.npz", **record(model, seed + 1))
        print(folder)


if __name__ == "__main__":
    main()
