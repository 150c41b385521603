r"""Trains all weights of a hybrid by distillation: the second stage, after `configs/distill.py`.

    python train.py --config=configs/distill_all.py:runs/stage1 --workdir=runs/stage2 \
        --config.distill.teacher=TEACHER \
        --config.data.train="('text/*.jsonl',)" --config.data.valid="('held_out.jsonl',)"

The loss is KL(teacher || student) alone; mixers have ten times the learning rate of all else. 16
million tokens. With billions of them cross-entropy may take the teacher's place
(`--config.distill.kl=0 --config.distill.ce=1`); with few it only moves the model towards that text.
PostNAS trains all weights on 350 billion tokens and does not name the loss (arXiv 2508.15884 §3.1).
"""

from configs import distill


def get_config(student=""):
    """The settings; `student` is the directory of the hybrid that training starts from."""
    config = distill.get_config(student)
    config.distill.mse = 0.0
    config.optim.freeze = ()
    config.optim.lr = 3e-4
    config.optim.lr_multipliers = ((r"\.mixer\.", 1.0), (r".", 0.1))
    config.steps = 500
    config.data.seed = 1  # other batches than the first run's
    return config
