"""A run of seconds over the quick-start text, for tests of `train.py`."""

from pathlib import Path

from configs.common import defaults

DATA = Path(__file__).resolve().parents[2] / "data" / "quickstart"


def get_config():
    """Two layers of width 16, 12 steps, a checkpoint every second step."""
    config = defaults()
    config.model = {
        "vocab_size": 2048,
        "hidden_size": 16,
        "intermediate_size": 32,
        "layer_types": ("jet", "swa"),
        "mixers": {
            "jet": {"num_heads": 2, "head_dim": 8},
            "swa": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "window_size": 8},
        },
        "dtype": "float32",
    }
    config.data.train = (str(DATA / "train.jsonl"),)
    config.data.valid = (str(DATA / "valid.jsonl"),)
    config.data.tokenizer = str(DATA / "tokenizer")
    config.data.seq_len = 16
    config.data.batch_size = 8
    config.data.pack_rows = 8
    config.mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    config.optim.eps = 1e-3  # rounding must not decide the sign of an update
    config.optim.warmup_steps = 2
    config.steps = 12
    config.log_every = 1
    config.eval_every = 6
    config.eval_batches = 2
    config.checkpoint_every = 2
    config.keep_checkpoints = 20
    return config
