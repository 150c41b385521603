"""PostNAS: turns a full-attention model into a hybrid of linear and full attention.

    python search.py --config=configs/search_smollm.py --workdir=runs/search

Stages: align, supernet, placement, blocks, ablations, shapes, hybrid, distill, finetune,
evaluate, report.
Those that the config has settings for run in turn, or one alone with --stage. What is done is not
done again, and a stage that was killed goes on from its newest checkpoint: run the same command
again. SIGTERM or Ctrl-C saves and ends it.

In the workdir: a JSON file a stage with what it decided, tables and figures, `model/` (the hybrid,
for train.py and every other command) and `report.html`.
"""

import sys
import time
from pathlib import Path

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from jet_jax import command_line, processes, sharding
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import STAGES, SearchConfig
from jet_jax.postnas.stage_training import Stopped
from jet_jax.postnas.stages import check_gates, is_asked, run
from jet_jax.progress import Display

LESS_MEMORY = (
    "Less memory: supernet.remat=layer, remat=full in comparisons and final training, a larger "
    "accumulation of any stage, a smaller placement.batch_size. What is done is kept: give the "
    "same command again with --config.SECTION.SETTING=VALUE (another accumulation of a comparison "
    "only after its folder is deleted)."
)
_CONFIG = config_flags.DEFINE_config_file("config", None, "File of settings.", lock_config=True)
_STAGE = flags.DEFINE_enum(
    "stage", None, list(STAGES), "Runs this stage alone; later ones are to be run anew."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Directory that the search writes to; by default runs/NAME[-ARG] for configs/NAME.py[:ARG].",
)


def prepare(config: SearchConfig, workdir: Path) -> Search:
    """Reads what there is. What is wrong with the settings comes up here."""
    processes.start(config.distributed, config.compile_cache)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    search = Search(config, workdir, mesh)
    search.check()
    return search


def search_all(search: Search, only: str | None) -> None:
    """Runs one stage, or all that are not done."""
    display = Display(0, live=False)
    teacher = search.teacher
    display.say(
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; teacher of {teacher.num_layers} "
        f"layers and {teacher.param_count():,} parameters, linear path {search.net.kind}"
    )
    check_gates(search)
    for stage in [only] if only else [s for s in STAGES if is_asked(search.config, s)]:
        if search.is_done(stage) and not only and stage != "report":
            display.say(f"{stage}: done before")
            continue
        start = time.perf_counter()
        result = run(search, stage)
        said = [f"{stage}: {time.perf_counter() - start:.1f} s"]
        if stage == "placement":
            said.append(f"full attention in layers {result['full']['layers']}")
        if stage == "evaluate":
            said += ["\n" + (search.workdir / "evaluation.md").read_text(encoding="utf-8")]
        said += [str(result[name]) for name in ("model", "report") if name in result]
        display.say(", ".join(said))


def main(argv):
    """Reads the settings and searches."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # Orbax tells much at each checkpoint
    memory = command_line.memory_errors("search.py", LESS_MEMORY)
    try:
        config = SearchConfig.from_dict(_CONFIG.value.to_dict())
        search = prepare(config, Path(_WORKDIR.value or command_line.default_workdir()))
        with memory:
            search_all(search, _STAGE.value)
    except Stopped as stopped:
        print(f"{stopped}. Run the same command again to go on.")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"search.py: error: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parser("search.py"))
