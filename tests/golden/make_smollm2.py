"""Records SmolLM2's float32 outputs as transformers and PyTorch compute them.

usage: python make_smollm2.py MODEL_DIR OUT.npz

Needs torch and transformers, in an environment of their own; MODEL_DIR is what
benchmarks/fetch_smollm2.py --passages writes. A recording of all logits would be large: it keeps,
at every position of three prompts, the logits of `columns`, the five likeliest tokens and the
log-sum-exp; and the summed negative log-likelihood of each passage (its first token unscored).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n",
    "Water boils at 100 degrees, but on a high mountain the air is thin, and so",
)

torch.set_grad_enabled(False)
folder, out = Path(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
columns = np.random.default_rng(0).choice(model.config.vocab_size, 256, replace=False)
arrays = {"prompts": np.array(PROMPTS), "columns": columns}
for i, prompt in enumerate(PROMPTS):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    logits = model(ids).logits[0]
    arrays |= {
        f"ids_{i}": ids[0].numpy(),
        f"logits_{i}": logits[:, columns].numpy(),
        f"top_{i}": logits.topk(5).indices.numpy(),
        f"logsumexp_{i}": logits.logsumexp(-1).numpy(),
    }
for kind in ("wikipedia", "owt"):
    sums, counts = [], []
    for line in (folder / f"{kind}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids
        logprobs = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        sums.append(-logprobs.gather(1, ids[0, 1:, None]).sum().item())
        counts.append(ids.shape[1])
    arrays |= {f"{kind}_nll": np.array(sums), f"{kind}_tokens": np.array(counts)}
np.savez_compressed(out, **arrays)
