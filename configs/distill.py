r"""Trains a hybrid by distillation, its MLPs frozen: the first stage after a search.

    python train.py --config=configs/distill.py:STUDENT --workdir=runs/stage1 \
        --config.distill.teacher=TEACHER \
        --config.data.train="('text/*.jsonl',)" --config.data.valid="('held_out.jsonl',)"

STUDENT is the hybrid's directory, such as the `model` that `search.py` leaves in its workdir;
TEACHER is that of the model it was made from. The loss is the squared error of each mixer's output
plus KL(teacher || student). Mixers and the norms before them train; MLPs, the norms before those,
the embedding, the last norm and the head are the teacher's and stay so. 32,768 tokens a step, 33
million in all, which suits models of 100 to 500 million parameters; PostNAS takes 50 billion
(arXiv 2508.15884 §3.1) and prints neither loss weights nor learning rate.

Then `configs/distill_all.py` trains all weights.
"""

from configs.common import defaults, fields
from jet_jax.distill import DistillConfig

# One pattern, since a tied model has no head and a pattern that finds nothing is an error.
FROZEN = (
    r"(^(embed_tokens|norm|lm_head)|\.(mlp|post_attention_layernorm|\w+_feedforward_layernorm))\."
)


def get_config(student=""):
    """The settings; `student` is the directory of the hybrid that training starts from."""
    config = defaults()
    config.init_from = student
    config.distill = fields(DistillConfig)
    config.data.seq_len = 2048
    config.data.batch_size = 16
    config.remat = "full"
    config.optim.freeze = (FROZEN,)
    config.optim.lr = 5e-4
    config.optim.warmup_steps = 30
    config.optim.weight_decay = 0.0
    config.steps = 1000
    config.eval_every = 200
    config.checkpoint_every = 200
    return config
