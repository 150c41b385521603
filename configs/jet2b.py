"""Jet-Nemotron-2B: 1,964,806,208 parameters, 28 layers (24 jet, 2 attn, 2 swa).

    python train.py --config=configs/jet2b.py --workdir=runs/jet2b \
        --config.data.train="('corpus/*.jsonl.zst',)" --config.data.tokenizer=PATH/TO/TOKENIZER

Float32 masters, gradients and moments take 31 GB beside the activations: one 80 GB device at
4096 tokens a row, or `--config.mesh.fsdp=-1 --config.mesh.data=1` over several. With
`--config.init_from=PATH/TO/Jet-Nemotron-2B` it trains on from the released weights. Sizes:
Jet-Nemotron, arXiv:2508.15884, and its released config.
"""

from configs.common import defaults

NUM_LAYERS, ATTENTION, WINDOW = 28, (14, 19), (20, 21)


def get_config():
    """The settings; text and tokenizer have to be given."""
    config = defaults()
    attention = {
        "num_heads": 12,
        "num_kv_heads": 2,
        "head_dim": 128,
        "qkv_bias": True,
        "rope": {"theta": 1e6},
    }
    config.model = {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "layer_types": tuple(
            "attn" if i in ATTENTION else "swa" if i in WINDOW else "jet" for i in range(NUM_LAYERS)
        ),
        "mixers": {
            "attn": attention,
            "swa": attention | {"window_size": 1152},
            "jet": {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667},
        },
        "max_position_embeddings": 131072,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    config.data.seq_len = 4096
    config.data.batch_size = 8
    config.accumulation = 8
    config.remat = "full"
    config.optim.schedule = "wsd"
    config.optim.lr = 3e-4
    config.optim.warmup_steps = 1000
    config.steps = 50_000
    config.eval_every = 1000
    config.checkpoint_every = 1000
    return config
