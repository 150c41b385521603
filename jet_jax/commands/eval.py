"""`jet-jax eval`: what a model recalls, answers and predicts, alone or beside others."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from jet_jax.commands.model_options import add_model_options, dtype_of

if TYPE_CHECKING:
    from jet_jax.evaluation.request import Request
    from jet_jax.models.lm import HybridLM


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a model: retrieval, arithmetic, choices, perplexity",
        description="Measures a model on built-in tasks, on sets of questions or texts, and on "
        "tasks of lm-eval. docs/evaluation.md says what each measures and how to read intervals.",
    )
    add = parser.add_argument
    add("model", nargs="?", help="a Hugging Face, converted or training directory")
    add(
        "--tasks",
        nargs="+",
        default=[],
        metavar="NAME",
        help="built-in tasks, .jsonl files, lm:TASK[@SHOTS] or paper:GROUP",
    )
    add("--list", action="store_true", help="print the tasks, a line each, and stop")
    add("--teacher", metavar="MODEL", help="a model to compare with, over the same vocabulary")
    add(
        "--without-linear",
        action="store_true",
        help="compare with the model whose linear-attention layers give zeros",
    )
    add("--length", type=int, metavar="N", help="tokens of a row (default: the task's own)")
    add(
        "--items",
        type=int,
        metavar="N",
        help="texts of a generated task (default 128), or questions or documents (default: all)",
    )
    add("--batch", type=int, default=8, metavar="N", help="rows at a time (default: %(default)s)")
    add("--documents", nargs="+", default=[], metavar="FILE", help="txt or jsonl text files")
    add("--split", choices=("search", "tuning", "test"), help="third of the items (by hash)")
    add("--seed", type=int, default=0, metavar="N", help="of generated items (default: 0)")
    add(
        "--template",
        metavar="TEXT",
        help="what stands before a choice, with {question} in it; '{question}' for sentences "
        "to be continued",
    )
    add(
        "--free-running",
        type=int,
        metavar="N",
        help="let model and teacher write N tokens after the beginnings of --documents",
    )
    add("--lm-tasks", metavar="DIR", help="folder of YAML files with the tasks that lm: names")
    add_model_options(parser)
    add("--json", metavar="FILE", help="also write everything to a JSON file")


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns 0.

    Raises:
      ValueError: for what cannot be; no weights are loaded before that is known.
      OSError: for a file that cannot be read.
    """
    from jet_jax.evaluation import request

    if args.list:
        print("\n".join(request.listing()))
        return 0
    asked = request.prepare(args)

    from jet_jax.evaluation import comparisons, report
    from jet_jax.evaluation.ablation import without_linear
    from jet_jax.io import load

    dtype = dtype_of(args)
    console = report.console()
    with console.status("loading"):
        models = {"model": load(args.model, dtype=dtype)}
        if args.teacher:
            models["teacher"] = load(args.teacher, dtype=dtype)
        if args.without_linear:
            models["no_linear"] = without_linear(models["model"])
    out = report.start(args, dtype)
    with report.progress(console, len(models) * len(asked.rows)) as step:
        for name, rows in asked.rows.items():
            began = time.perf_counter()
            result = comparisons.compare(
                models, rows, asked.tasks[name].measure, args.batch, lambda m, t=name: step(t, m)
            )
            seconds = time.perf_counter() - began
            out["tasks"][name] = {"about": asked.tasks[name].about, "seconds": seconds} | result
            report.write(args.json, out)  # so that a run that is stopped leaves what it has
    report.show_tasks(console, out["tasks"])
    if asked.prompts:
        with console.status(f"writing {args.free_running} tokens freely"):
            out["free_running"] = comparisons.free_running(
                models["model"],
                models["teacher"],
                asked.prompts,
                args.free_running,
                args.batch,
                args.seed,
            )
        report.show_free_running(console, out["free_running"])
        report.write(args.json, out)
    if asked.loaded is not None:
        out["lm_eval"] = _lm_eval(args, asked, models)
        report.show_lm_eval(console, out["lm_eval"])
        report.write(args.json, out)
    return 0


def _lm_eval(
    args: argparse.Namespace, asked: Request, models: dict[str, HybridLM]
) -> dict[str, Any]:
    """The results of lm-eval's tasks by model."""
    from jet_jax.evaluation import lm_eval_tasks
    from jet_jax.evaluation.lm_eval_adapter import JetLM

    assert asked.loaded is not None
    out = {}
    for name, model in models.items():
        lm = JetLM(
            model,
            asked.tokenizer,
            batch_size=args.batch,
            max_length=asked.lm_length,
            end_ids=asked.end_ids,
            seed=args.seed,
        )
        out[name] = lm_eval_tasks.run(lm, asked.loaded, args.items, args.seed)
    return out
