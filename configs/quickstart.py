"""Trains a small hybrid on three novels by Jane Austen; two to three minutes on two CPU cores.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Expected: validation loss about 4.43 nats a token (6.27 for token frequencies alone), and samples
that look like English of 1813 without its sense. `configs/quickstart.py:smoke` runs 20 steps only.
"""

from pathlib import Path

from configs.common import defaults

DATA = Path(__file__).resolve().parent.parent / "data" / "quickstart"


def get_config(arg=""):
    """The settings; `arg` "smoke" makes a run of some seconds that shows that everything works."""
    config = defaults()
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "qkv_bias": True}
    config.model = {
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 384,
        "layer_types": ("jet", "swa", "jet", "attn"),
        "mixers": {
            "jet": {"num_heads": 2, "head_dim": 32},
            "swa": attention | {"window_size": 32},
            "attn": attention,
        },
        "eos_token_id": 0,
        "dtype": "float32",
    }
    config.data.train = (str(DATA / "train.jsonl"),)
    config.data.valid = (str(DATA / "valid.jsonl"),)
    config.data.tokenizer = str(DATA / "tokenizer")
    config.data.seq_len = 128
    config.data.batch_size = 8
    config.optim.lr = 3e-3
    config.optim.warmup_steps = 20
    config.steps = 500
    config.eval_every = 50
    config.eval_batches = 16
    config.sample_prompts = ("It is a truth universally acknowledged, that",)
    config.sample_tokens = 48
    config.sample_temperature = 0.8
    config.checkpoint_every = 250
    config.sample_every = 250
    config.unigram_entropy = 6.274
    if arg == "smoke":
        config.steps = 20
        config.optim.warmup_steps = 5
        config.eval_batches = 2
    elif arg:
        raise ValueError(f"configs/quickstart.py:{arg}: the only variant is :smoke.")
    return config
