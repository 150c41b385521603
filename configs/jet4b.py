"""Jet-Nemotron-4B: 3,960,424,768 parameters, 36 layers (26 jet, 3 attn, 7 swa).

    python train.py --config=configs/jet4b.py --workdir=runs/jet4b --config.mesh.fsdp=8 \
        --config.data.train="('corpus/*.jsonl.zst',)" --config.data.tokenizer=PATH/TO/TOKENIZER

Float32 masters, gradients and moments take 63 GB beside the activations, so it wants several
devices (`mesh.fsdp`). With `--config.init_from=PATH/TO/Jet-Nemotron-4B` it trains on from the
released weights. Sizes: Jet-Nemotron, arXiv:2508.15884, and its released config.
"""

from configs.common import defaults

NUM_LAYERS, ATTENTION, WINDOW = 36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27)


def get_config():
    """The settings; text and tokenizer have to be given."""
    config = defaults()
    attention = {
        "num_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 128,
        "qkv_bias": True,
        "rope": {"theta": 1e6},
    }
    config.model = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": tuple(
            "attn" if i in ATTENTION else "swa" if i in WINDOW else "jet" for i in range(NUM_LAYERS)
        ),
        "mixers": {
            "attn": attention,
            "swa": attention | {"window_size": 2048},
            "jet": {"num_heads": 16, "head_dim": 128, "expand_v": 2.0},
        },
        "max_position_embeddings": 32768,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    config.data.seq_len = 4096
    config.data.batch_size = 8
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}
    config.remat = "full"
    config.optim.schedule = "wsd"
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 1000
    config.steps = 50_000
    config.eval_every = 1000
    config.checkpoint_every = 1000
    return config
