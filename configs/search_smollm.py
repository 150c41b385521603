"""Searches where SmolLM2-135M should keep full attention; see docs/postnas.md.

    python benchmarks/fetch_smollm2.py --out models/smollm2
    python search.py --config=configs/search_smollm.py --workdir=runs/search_smollm

As it stands it trains on the three novels of the quick start, which shows that everything works. A
search that means something needs more text and held-out documents of 2,048 tokens and more:
`--config.data.train="('corpus/train/*.jsonl.zst',)"` and
`--config.placement.objectives.text.documents="('corpus/valid.jsonl',)"`.

Linear path: gated linear attention of the attention's own shape (9 heads of 64). 8 million tokens
of teacher-forced alignment, 20 million on sampled paths. `:smoke` runs a few steps on a few rows.
"""

from pathlib import Path

from configs.search_common import defaults, objective

DATA = Path(__file__).resolve().parent.parent / "data" / "quickstart"


def get_config(arg=""):
    """The settings; `arg` "smoke" makes a short one that shows that everything works."""
    config = defaults()
    config.teacher = "models/smollm2"
    config.data.train = (str(DATA / "train.jsonl"),)
    config.data.seq_len = 1024
    config.data.batch_size = 32
    config.align.steps = 250
    config.align.optim.lr = 2e-3
    config.align.optim.warmup_steps = 25
    config.align.optim.min_lr_ratio = 0.01
    config.supernet.steps = 610
    config.supernet.optim.lr = 5e-4
    config.supernet.optim.warmup_steps = 30
    config.placement.objectives.retrieval = objective("mqar", length=512, num_items=128, gate=0.5)
    config.placement.objectives.text = objective(
        "perplexity", figure="kl", length=1024, documents=(str(DATA / "valid.jsonl"),)
    )
    config.placement.full = 2
    config.placement.full_by = "retrieval"
    config.placement.windows = 2
    config.placement.window_by = "text"
    config.placement.window = 320
    config.placement.curve = (1, 2, 4)
    config.checkpoint_every = 100
    if arg == "smoke":
        config.data.seq_len, config.data.batch_size = 128, 2
        for stage in (config.align, config.supernet):
            stage.steps = 4
            stage.optim.warmup_steps = 1
        config.placement.objectives.retrieval.num_items = 4
        config.placement.objectives.retrieval.gate = None
        config.placement.objectives.text.length = 128
        config.placement.selector = "single"
        config.placement.curve = (1,)
    elif arg:
        raise ValueError(f"configs/search_smollm.py:{arg}: the only variant is :smoke.")
    return config
