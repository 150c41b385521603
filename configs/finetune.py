r"""Trains a model that exists on your own text.

    python train.py --config=configs/finetune.py:MODEL --workdir=runs/tuned \
        --config.data.train="('text/*.txt',)" --config.data.valid="('held_out.txt',)"

MODEL is a Hugging Face directory (Qwen2, Qwen3, Llama, Gemma 3 text, Jet-Nemotron), a converted
model or another run's workdir; its tokenizer is used. Costs four times the float32 weights in
memory, plus activations.
"""

from configs.common import defaults


def get_config(model=""):
    """The settings; `model` is the directory that training starts from."""
    config = defaults()
    config.init_from = model
    config.data.seq_len = 1024
    config.data.batch_size = 8
    config.accumulation = 1
    config.remat = "full"
    config.optim.lr = 2e-5
    config.optim.warmup_steps = 20
    config.optim.weight_decay = 0.0
    config.steps = 500
    config.eval_every = 100
    config.checkpoint_every = 250
    return config
