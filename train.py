"""Trains a hybrid language model.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any setting can be changed on the command line: `--config.optim.lr=1e-3 --config.mesh.fsdp=8`. Run
the same command again and it continues from the newest checkpoint in the workdir, with the same
batches and the same numbers as if it had never stopped. SIGTERM or Ctrl-C saves and ends it.

With a teacher (configs/distill.py) the loss is that of distillation, and validation tells the
next-token loss and the KL to the teacher.

In the workdir: `checkpoints/`, `tokenizer/`, `metrics.jsonl`, `tensorboard/`, `loss_curve.png`.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jet_jax import command_line, loss_curve
from jet_jax.progress import closing_words
from jet_jax.train_config import TrainConfig
from jet_jax.train_run import loop, prepare

LESS_MEMORY = (
    "Less memory: --config.remat=full, a larger --config.accumulation, a smaller "
    "--config.data.batch_size, or more devices with --config.mesh.fsdp=-1 --config.mesh.data=1. "
    "The same command goes on from the newest checkpoint."
)
_CONFIG = config_flags.DEFINE_config_file("config", None, "File of settings.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory that the run writes to; by default runs/NAME[-ARG] for configs/NAME.py[:ARG].",
)


def main(argv):
    """Reads the settings, trains, and says where the results are."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells much at each checkpoint
    try:
        config = TrainConfig.from_dict(_CONFIG.value.to_dict())
        run = prepare(config, Path(_WORKDIR.value or command_line.default_workdir()))
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    memory = command_line.memory_errors("train.py", LESS_MEMORY)
    with memory, jax.set_mesh(run.mesh), run.stack:
        finished = loop(run)
    if jax.process_index() == 0:
        curve = loss_curve.plot_loss(run.workdir, config.unigram_entropy)
        prompt = config.sample_prompts[0] if config.sample_prompts else "Once"
        print(closing_words(run.workdir, finished, curve, prompt))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parser("train.py"))
