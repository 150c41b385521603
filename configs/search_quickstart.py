"""Finds the two layers that a tiny recall teacher needs; about two minutes on two CPU cores.

    python search.py --config=configs/search_quickstart.py --workdir=runs/search_quickstart

The teachers in data/recall have six layers, of which two have full attention and four a window of
four tokens, and answer questions that take two look-ups in a table of 24 pairs. The linear path's
state is too small for the table, so the answer is known: the search must keep those two layers. The
argument names the teacher: `:1-4` (the default), `:2-4` or `:1-3`.
"""

from pathlib import Path

from configs.search_common import defaults, objective

RECALL = Path(__file__).resolve().parent.parent / "data" / "recall"
TEACHERS = ("1-4", "2-4", "1-3")


def get_config(arg=""):
    """The settings; `arg` names the two full layers of the teacher."""
    arg = arg or TEACHERS[0]
    if arg not in TEACHERS:
        known = ", ".join(f":{name}" for name in TEACHERS)
        raise ValueError(f"configs/search_quickstart.py:{arg} is unknown; there are {known}")
    config = defaults()
    config.teacher = str(RECALL / f"full_{arg.replace('-', '_')}")
    config.data.train = (str(RECALL / "train.jsonl"),)
    config.data.seq_len = 74  # a row of text
    config.data.batch_size = 32
    # Two heads with states of 8 x 16 numbers, for 24 pairs; its convolutions see the window.
    config.linear.kind = "gdn"
    config.linear.options = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0}
    config.linear.init = "random"
    config.align.steps = 40
    config.align.optim.lr = 1e-2
    config.align.optim.warmup_steps = 10
    config.supernet.steps = 20
    config.supernet.law.max_full = 3
    config.supernet.optim.lr = 2e-3
    config.supernet.optim.warmup_steps = 5
    search = (str(RECALL / "search.jsonl"),)
    config.placement.objectives.kl = objective(
        "perplexity", figure="kl", length=74, documents=search
    )
    config.placement.full = 2
    config.placement.curve = (1, 2, 3)
    config.checkpoint_every = 50
    return config
