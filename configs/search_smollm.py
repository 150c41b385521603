"""Searches where SmolLM2-135M should keep full attention; see docs/postnas.md.

    python benchmarks/fetch_smollm2.py --out models/smollm2
    python search.py --config=configs/search_smollm.py --workdir=runs/search_smollm

As it stands it trains on the three novels of the quick start, which shows that everything works. A
search that means something needs more text and held-out documents of 2,048 tokens and more:
`--config.data.train="('corpus/train/*.jsonl.zst',)"` and
`--config.placement.objectives.text.documents="('corpus/valid.jsonl',)"`.

Linear path: gated linear attention of the attention's own shape (9 heads of 64). 8 million tokens
of teacher-forced alignment, 20 million on sampled paths, then final training on 33 and 16 million.
`:all` also compares blocks, variants of the JetBlock and shapes. `:smoke` runs a few steps on a few
rows.
"""

from pathlib import Path

from configs import distill, distill_all
from configs.search_common import comparison, defaults, objective
from jet_jax.postnas.ablations import ablation_arms
from jet_jax.postnas.arms import block_arms, shape_arms

DATA = Path(__file__).resolve().parent.parent / "data" / "quickstart"


def get_config(arg=""):
    """The settings; `arg` "all" adds comparisons, "smoke" makes a search of a few minutes."""
    config = defaults()
    config.teacher = "models/smollm2"
    config.data.train = (str(DATA / "train.jsonl"),)
    config.data.seq_len = 1024
    config.data.batch_size = 16
    config.align.steps = 500
    config.align.optim.lr = 4e-3
    config.align.optim.warmup_steps = 50
    config.align.optim.min_lr_ratio = 0.01
    config.supernet.steps = 1220
    config.supernet.optim.lr = 1e-3
    config.supernet.optim.warmup_steps = 60
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
    config.distill, config.finetune = distill.get_config(), distill_all.get_config()
    if arg == "smoke":
        config.data.seq_len, config.data.batch_size = 128, 2
        for stage in (config.align, config.supernet):
            stage.steps = 4
            stage.optim.warmup_steps = 1
        config.placement.objectives.retrieval.num_items = 4
        config.placement.objectives.retrieval.gate = None
        config.placement.objectives.text.length = 128
        config.placement.selector = "single"
        config.measure.update({"context": 128, "batch": 2, "prefill_length": 128, "chunk": 64})
        config.placement.curve = (1,)
        for run in (config.distill, config.finetune):
            run.data.seq_len, run.data.batch_size, run.steps = 128, 2, 2
            run.optim.warmup_steps = 1
    elif arg == "all":
        # 2 million tokens of alignment and 3 of distillation for each arm and seed.
        runs = {"align_steps": 120, "steps": 180, "tuning_steps": 120, "init": "copy"}
        config.blocks = comparison(block_arms(), reference="gdn", **runs)
        config.ablations = comparison(ablation_arms(), reference="gdn", **runs)
        shapes = shape_arms("gdn", 9 * 64 * 64, heads=(3, 6, 9))
        runs["init"] = "random"  # other shapes than the attention's cannot be copied to
        config.shapes = comparison(shapes, reference="64-64-9", **runs)
        for part in (config.blocks, config.ablations, config.shapes):
            part.align_optim.lr = 4e-3
            part.optim.warmup_steps = part.align_optim.warmup_steps = 20
    elif arg:
        raise ValueError(f"configs/search_smollm.py:{arg}: there are :all and :smoke")
    return config
