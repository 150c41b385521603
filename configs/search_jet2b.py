r"""The whole of PostNAS at the paper's size: from Qwen2.5-1.5B to a model like Jet-Nemotron-2B.

    python search.py --config=configs/search_jet2b.py --workdir=runs/search_jet2b \
        --config.teacher=PATH/TO/Qwen2.5-1.5B --config.data.train="('corpus/*.jsonl.zst',)" \
        --config.placement.objectives.retrieval.documents="('held_out/*.jsonl',)" \
        --config.placement.objectives.choice.task=mmlu_dev.jsonl

Tokens as in arXiv 2508.15884: 50 billion for the supernet, 50 for each block, shape and the first
run of final training, 350 for the second; a million a step. What the paper leaves open is decided
in docs/postnas.md. Nothing of this size has been run with it: it is checked to build, and the
supernet's step to fit one 80 GB device at 8 rows of 4,096 tokens. `:small` takes the same stages
with a two-hundredth of the tokens, copied weights, alignment and KL, the recipe for small budgets.
"""

from configs import distill, distill_all
from configs.search_common import comparison, defaults, objective
from jet_jax.postnas.ablations import ablation_arms
from jet_jax.postnas.arms import block_arms, shape_arms

STATE = 294_912  # elements of a layer's state, key x value x heads
SHAPES = (
    "256-288-4", "192-384-4", "128-576-4", "256-144-8", "192-192-8", "128-288-8", "128-192-12",
    "96-256-12", "64-384-12",
)  # fmt: skip
BILLION = 10**9


def get_config(arg=""):
    """The settings; teacher, text and the objectives' files have to be given."""
    if arg not in ("", "small"):
        raise ValueError(f"configs/search_jet2b.py:{arg}: the only variant is :small")
    small = arg == "small"
    config = defaults()
    config.data.seq_len = 4096
    config.data.batch_size = 16 if small else 256
    config.mesh.data, config.mesh.fsdp = 1, -1
    per_step = config.data.seq_len * config.data.batch_size
    budget = 50 * BILLION // (200 if small else 1)
    steps = budget // per_step

    # The linear path of the supernet: gated linear attention of the final state's size.
    config.linear.kind = "gla"
    config.linear.options = {} if small else {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0}
    config.linear.init = "copy" if small else "random"
    config.align.steps = steps // 10 if small else 0
    config.align.optim.lr = 1e-3
    config.align.optim.warmup_steps = 50
    config.supernet.steps = steps
    config.supernet.law.max_full = 8 if small else 12
    config.supernet.loss.kl = 1.0 if small else 0.0
    config.supernet.train_full = not small
    config.supernet.accumulation = 2 if small else 32
    config.supernet.optim.lr = 5e-4
    config.supernet.optim.warmup_steps = 50

    # Two full layers by retrieval, then two windows by multiple choice.
    config.placement.objectives.retrieval = objective("extraction", length=2048, gate=0.3)
    config.placement.objectives.choice = objective("", figure="choice_loss", length=2048)
    config.placement.full, config.placement.full_by = 2, "retrieval"
    config.placement.windows, config.placement.window_by = 2, "choice"
    config.placement.window = 1152
    config.placement.curve = (1, 2, 4, 8)

    shared = {
        "align_steps": config.align.steps, "steps": steps, "tuning_steps": steps // 10,
        "init": config.linear.init, "seeds": (0, 1), "accumulation": config.supernet.accumulation,
    }  # fmt: skip
    config.blocks = comparison(block_arms(), reference="gdn", **shared)
    jet = {} if small else {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667}
    config.ablations = comparison(ablation_arms(jet), reference="gdn", **shared)
    # Other shapes than the attention's cannot be copied to.
    shapes = shape_arms("gdn", STATE, shapes=SHAPES)
    config.shapes = comparison(shapes, reference="192-384-4", **shared | {"init": "random"})
    for part in (config.blocks, config.ablations, config.shapes):
        part.loss.kl = config.supernet.loss.kl
        part.optim.warmup_steps = part.align_optim.warmup_steps = 50
        part.align_optim.lr = 1e-3
    config.final, config.final_options = "jet", jet

    for name, stage, tokens in (
        ("distill", distill, budget),
        ("finetune", distill_all, 7 * budget),
    ):
        config[name] = stage.get_config()
        config[name].data.seq_len = config.data.seq_len
        config[name].data.batch_size = config.data.batch_size
        config[name].accumulation = 1 if small else 4
        config[name].steps = tokens // per_step
    if not small:  # the paper trains all weights on the text itself
        config.finetune.distill.kl, config.finetune.distill.ce = 0.0, 1.0
        config.finetune.optim.lr_multipliers = ()
        config.finetune.optim.lr = 1e-4
    config.checkpoint_every = 500
    return config
