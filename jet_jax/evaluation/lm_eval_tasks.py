"""Tasks of lm-eval by name, and the groups in which Jet-Nemotron's tables have them.

Tasks, metrics and shots: Jet-Nemotron (arXiv 2508.15884) §3.1 and its released evaluation
configs. Nothing here needs lm-eval but `load` and `run`.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

LM, PAPER = "lm:", "paper:"  # what such names begin with


class Entry(NamedTuple):
    """A task of lm-eval.

    Attributes:
      task: its name there.
      metric: the figure to show, as "acc" or "exact_match,flexible-extract"; None for the first.
      shots: examples before a question; None leaves it to the task.
      group: the paper's table that it belongs to, "" for none.
    """

    task: str
    metric: str | None = None
    shots: int | None = None
    group: str = ""


def _group(metric: str, tasks: str, shots: int | None = 0) -> tuple[Entry, ...]:
    return tuple(Entry(task, metric, shots) for task in tasks.split())


# LongBench here has rows of up to 262,144 tokens (--length), the others of 4,096. lm-eval's own
# bbh brings three worked examples, which the paper's "zero-shot" does not speak of.
GROUPS: dict[str, tuple[Entry, ...]] = {
    "mmlu": _group("acc", "mmlu"),
    "mmlu_pro": _group("exact_match,custom-extract", "mmlu_pro", 5),
    "bbh": _group("exact_match,get-answer", "bbh", None),
    "commonsense": _group("acc_norm", "arc_challenge arc_easy piqa openbookqa")
    + _group("acc", "winogrande boolq truthfulqa_mc2"),
    "math": _group("exact_match,flexible-extract", "gsm8k", 4)
    + _group("exact_match", "hendrycks_math", 4)
    + _group("exact_match,flexible-extract", "gpqa_main_generative_n_shot", 5)
    + _group("acc", "mmlu_stem")
    + _group("acc_norm", "mathqa"),
    "retrieval": _group("contains", "fda swde squad_completion"),
    "longbench": _group(
        "score",
        "longbench_fewshot longbench_code longbench_summarization longbench_single longbench_multi",
        None,
    ),
}
ELSEWHERE = ("evalplus", "cruxeval", "coding")  # run generated programs, with tools of their own


def is_ours(name: str) -> bool:
    """Whether a name is meant for this module."""
    return name.startswith((LM, PAPER))


def expand(names: Sequence[str]) -> list[Entry]:
    """The tasks that names stand for: "lm:TASK", "lm:TASK@SHOTS" or "paper:GROUP".

    Raises:
      ValueError: an unknown group, or shots that are no number.
    """
    found: list[Entry] = []
    for name in names:
        if name.startswith(PAPER):
            group = name.removeprefix(PAPER)
            if group in ELSEWHERE:
                raise ValueError(
                    f"{name} is not among lm-eval's tasks: EvalPlus and CRUXEval run the programs "
                    "that a model writes and have tools of their own"
                )
            if group not in GROUPS:
                near = difflib.get_close_matches(group, GROUPS, n=1)
                hint = f", did you mean {PAPER}{near[0]}?" if near else ";"
                raise ValueError(f"unknown group {name!r}{hint} known are {', '.join(GROUPS)}")
            found += [entry._replace(group=group) for entry in GROUPS[group]]
            continue
        task, at, shots = name.removeprefix(LM).partition("@")
        if not task or (at and not shots.isdigit()):
            raise ValueError(f"task {name!r}: expected lm:TASK or lm:TASK@SHOTS, as lm:gsm8k@4")
        found.append(Entry(task, None, int(shots) if at else None))
    return list(dict.fromkeys(found))


def require() -> None:
    """Raises ValueError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks that begin with lm: or paper: need lm-eval, which is not installed: "
            "pip install 'jet-jax[eval]'"
        )


class Loaded(NamedTuple):
    """Tasks with their data.

    Attributes:
      manager: lm-eval's TaskManager.
      tasks: for each entry its task or group objects.
    """

    manager: Any
    tasks: dict[Entry, list[Any]]


def load(entries: Sequence[Entry], folder: str | None = None) -> Loaded:
    """Finds tasks and reads their data, from the Hugging Face hub or its cache.

    Args:
      entries: the tasks.
      folder: a folder of YAML files to take the tasks from, instead of lm-eval's own.

    Raises:
      ValueError: lm-eval is not installed, an unknown task, or data that cannot be had.
    """
    require()
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    for entry in entries:
        if entry.task not in manager.all_tasks:
            near = difflib.get_close_matches(entry.task, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"lm-eval has no task {entry.task!r}{hint}")
    tasks = {}
    for entry in entries:
        try:
            loaded = manager.load([entry.task])
        except Exception as error:  # datasets and its file systems raise all kinds
            raise ValueError(
                f"the data of lm:{entry.task} cannot be loaded ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}); it comes from the "
                "Hugging Face hub or its cache (HF_HOME), or from --lm-tasks DIR"
            ) from error
        group = loaded["groups"].get(entry.task)
        tasks[entry] = list(loaded["tasks"].values()) if group is None else [group]
    return Loaded(manager, tasks)


def run(lm: Any, loaded: Loaded, limit: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Runs tasks, those of one number of shots together.

    Args:
      lm: a `JetLM`.
      loaded: from `load`.
      limit: the most questions of each task; None for all.
      seed: of the examples.

    Returns:
      A dict a task: `task`, `group`, `shots`, `metric`, `value` and `stderr` (None where lm-eval
      gives none), and `results`, all that lm-eval gives for it and the tasks below it.
    """
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]

    out = []
    for shots in dict.fromkeys(entry.shots for entry in loaded.tasks):
        entries = [entry for entry in loaded.tasks if entry.shots == shots]
        report = simple_evaluate(
            model=lm,
            tasks=[task for entry in entries for task in loaded.tasks[entry]],
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            task_manager=loaded.manager,
            fewshot_random_seed=seed,
        )
        results = {**report["results"], **report.get("groups", {})}
        for entry in entries:
            below = report.get("group_subtasks", {}).get(entry.task, [])
            mine = results.get(entry.task) or results[loaded.tasks[entry][0].task_name]
            metric, value, stderr = pick(mine, entry.metric)
            out.append(
                {
                    "task": entry.task,
                    "group": entry.group,
                    "shots": shots,
                    "metric": metric,
                    "value": value,
                    "stderr": stderr,
                    "results": {
                        entry.task: _plain(mine),
                        **{name: _plain(results[name]) for name in below if name in results},
                    },
                }
            )
    return out


def pick(results: dict[str, Any], metric: str | None) -> tuple[str, float, float | None]:
    """A metric's name, value and standard error out of a task's results.

    Raises:
      ValueError: there is no such metric.
    """
    figures = {
        name: value
        for name, value in results.items()
        if isinstance(value, int | float) and "," in name and "_stderr," not in name
    }
    wanted = next(iter(figures), "") if metric is None else metric
    wanted = wanted if "," in wanted else f"{wanted},none"
    if wanted not in figures:
        raise ValueError(f"lm-eval gave no {wanted}, only {', '.join(figures) or 'nothing'}")
    stderr = results.get(wanted.replace(",", "_stderr,"))
    is_number = isinstance(stderr, int | float)
    return (
        wanted.removesuffix(",none"),
        float(figures[wanted]),
        float(stderr) if is_number else None,
    )


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in results.items() if isinstance(v, str | int | float)}
