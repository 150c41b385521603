"""Finds the two layers that a tiny recall teacher needs, then goes through all other stages.

    python search.py --config=configs/search_quickstart.py --workdir=runs/search_quickstart

The teachers in data/recall have six layers, of which two have full attention and four a window of
four tokens, and answer questions that take two look-ups in a table of 24 pairs. The linear path's
state is too small for the table, so the answer is known: the search must keep those two layers.

Without an argument all stages run, with two arms in each comparison and a few steps of final
training, which shows how they work and compares nothing in earnest. `:1-4`, `:2-4` and `:1-3` name
a teacher by its full layers and only place: a minute or two on two CPU cores.
"""

from pathlib import Path

from configs import distill, distill_all
from configs.search_common import comparison, defaults, objective
from jet_jax.postnas.ablations import ablation_arms
from jet_jax.postnas.arms import shape_arms

RECALL = Path(__file__).resolve().parent.parent / "data" / "recall"
TEACHERS = ("1-4", "2-4", "1-3")
SIZES = {"context": 64, "batch": 2, "prefill_length": 64, "chunk": 32, "repeats": 3}  # of timings


def get_config(arg=""):
    """The settings; `arg` names the two full layers of the teacher and leaves it at placement."""
    teacher = arg or TEACHERS[0]
    if teacher not in TEACHERS:
        known = ", ".join(f":{name}" for name in TEACHERS)
        raise ValueError(f"configs/search_quickstart.py:{arg} is unknown; there are {known}")
    config = defaults()
    config.teacher = str(RECALL / f"full_{teacher.replace('-', '_')}")
    config.data.train = (str(RECALL / "train.jsonl"),)
    config.data.seq_len = 74  # a row of text
    config.data.batch_size = 16
    # Two heads with states of 8 x 16 numbers, for 24 pairs; its convolutions see the window.
    config.linear.kind = "gdn"
    config.linear.options = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0}
    config.linear.init = "random"
    config.align.steps = 120
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
    config.measure.update(SIZES)
    if arg:
        config.measure = None  # the hybrid is not trained, and compiling takes longer than the rest
    else:
        _add_other_stages(config, search)
    return config


def _add_other_stages(config, held_out):
    """Comparisons of two arms each, the best block, and both runs of final training."""
    jet = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0}
    retnet = {"num_heads": 2, "expand_k": 0.25, "expand_v": 0.5}
    variants = ablation_arms(jet)
    blocks = {
        "jet": {"kind": "jet", "options": jet},
        "retnet": {"kind": "retnet", "options": retnet},
    }
    ablations = {name: variants[name] for name in ("jet", "no-conv")}
    shapes = shape_arms("jet", 2 * 8 * 16, shapes=("8-16-2", "16-16-1"))
    for name, arms in (("blocks", blocks), ("ablations", ablations), ("shapes", shapes)):
        config[name] = comparison(arms, steps=10, init="random", remat="none")
        config[name].learning_rates, config[name].seeds = (2e-3,), (0,)
        config[name].optim.warmup_steps = 2
        config[name].measure.update(SIZES)
    # Most of the time goes into compiling, so blocks alone are aligned first.
    config.blocks.align_steps = 20
    config.blocks.align_optim.lr, config.blocks.align_optim.warmup_steps = 1e-2, 2
    config.ablations.measure = None
    config.final = "blocks"
    for name, stage in (("distill", distill), ("finetune", distill_all)):
        config[name] = stage.get_config()
        config[name].data.seq_len, config[name].data.batch_size = 74, 32
        config[name].data.valid = held_out
        config[name].optim.warmup_steps = 5
        config[name].remat, config[name].steps = "none", 40
        config[name].log_every = 10
