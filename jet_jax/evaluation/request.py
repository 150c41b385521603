"""What `jet-jax eval` is asked for, checked and made ready before any weights are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jet_jax.config import ModelConfig
from jet_jax.data.tokenizer import TextTokenizer, load_tokenizer
from jet_jax.evaluation import lm_eval_tasks, tasks
from jet_jax.evaluation.ablation import linear_layers
from jet_jax.evaluation.haystack import start
from jet_jax.evaluation.rows import Rows
from jet_jax.io import load_config, tokenizer_dir
from jet_jax.prompt_text import ending_ids, find_tokenizer, load_matching

PROMPT = 64  # tokens of a document that free running begins with
PROMPTS = 32  # documents that it takes by default
LM_LENGTH = 4096  # tokens that lm-eval's tasks see by default, as in the paper


@dataclass(frozen=True)
class Request:
    """All but the weights.

    Attributes:
      tokenizer: of the model.
      end_ids: ids that end a text.
      tasks: by the name that the user gave.
      rows: of each task.
      prompts: token ids that free running begins with, none unless asked for.
      loaded: lm-eval's tasks, None unless asked for.
      lm_length: tokens that those see at once.
    """

    tokenizer: TextTokenizer
    end_ids: Sequence[int]
    tasks: dict[str, tasks.Task]
    rows: dict[str, Rows]
    prompts: list[list[int]]
    loaded: lm_eval_tasks.Loaded | None
    lm_length: int


def listing() -> list[str]:
    """The tasks, a line each."""
    lines = [(name, f"{task.about} ({task.length} tokens)") for name, task in tasks.TASKS.items()]
    lines += [
        ("FILE.jsonl", "questions with choices, or texts (benchmarks/fetch_eval_sets.py)"),
        ("lm:TASK[@SHOTS]", "a task of lm-eval, as lm:arc_easy or lm:gsm8k@4"),
    ]
    for group, entries in lm_eval_tasks.GROUPS.items():
        lines.append((f"paper:{group}", f"lm-eval's {', '.join(e.task for e in entries)}"))
    return [f"{name:<18} {about}" for name, about in lines]


def prepare(args: argparse.Namespace) -> Request:
    """Checks the arguments of `jet-jax eval` and makes the rows.

    Raises:
      ValueError: for what cannot be; the message says what to change.
      OSError: for a file that cannot be read.
    """
    _check(args)
    ours = [name for name in args.tasks if not lm_eval_tasks.is_ours(name)]
    chosen = tasks.find(ours)
    entries = lm_eval_tasks.expand([name for name in args.tasks if name not in ours])
    needing = [name for name, task in chosen.items() if task.needs_documents]
    if needing and not args.documents:
        raise ValueError(f"{', '.join(needing)}: give texts with --documents FILE ...")
    if entries:
        lm_eval_tasks.require()
    documents = tasks.read_documents(args.documents) if args.documents else ()
    config = load_config(args.model)
    most = config.max_position_embeddings
    if args.length is not None and args.length > most:
        raise ValueError(
            f"--length {args.length} exceeds the model's max_position_embeddings of {most}"
        )
    where = find_tokenizer(args.model, args.tokenizer)
    tokenizer = load_matching(where, config)
    if args.teacher:
        _check_teacher(args.teacher, config, tokenizer)
    if args.without_linear:
        linear_layers(config)
    settings = tasks.Settings(
        args.length,
        args.items,
        args.seed,
        args.split,
        documents,
        args.template or tasks.TEMPLATE,
    )
    rows = {name: task.rows(tokenizer, settings) for name, task in chosen.items()}
    for name, made in rows.items():
        if made.tokens.shape[1] > most:
            raise ValueError(
                f"{name} has rows of {made.tokens.shape[1]} tokens, the model takes {most}; "
                f"give --length, at most {most}"
            )
    return Request(
        tokenizer=tokenizer,
        end_ids=ending_ids(where, tokenizer, config),
        tasks=chosen,
        rows=rows,
        prompts=_prompts(tokenizer, documents, args.items) if args.free_running else [],
        loaded=lm_eval_tasks.load(entries, args.lm_tasks) if entries else None,
        lm_length=args.length or min(LM_LENGTH, most),
    )


def _check(args: argparse.Namespace) -> None:
    """What can be said without reading any file."""
    if args.model is None:
        raise ValueError("no model; name a directory (--list shows the tasks)")
    if not args.tasks and args.free_running is None:
        raise ValueError("no tasks; give --tasks NAME ... (--list shows them)")
    for option in ("length", "items", "batch", "free_running"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value} must be at least 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed} must be at least 0")
    if args.free_running and not (args.teacher and args.documents):
        raise ValueError("--free-running needs --teacher MODEL and --documents FILE ...")
    if args.template is not None and "{question}" not in args.template:
        raise ValueError(f"--template {args.template!r} does not hold {{question}}")
    if args.lm_tasks and not Path(args.lm_tasks).is_dir():
        raise ValueError(f"--lm-tasks {args.lm_tasks} is not a directory")
    if args.json:
        path = Path(args.json)
        if path.is_dir() or not path.parent.is_dir():
            what = "is a directory" if path.is_dir() else "lies in a directory that does not exist"
            raise ValueError(f"--json {path} {what}")


def _check_teacher(path: str, config: ModelConfig, tokenizer: TextTokenizer) -> None:
    """Raises ValueError unless a teacher has the model's vocabulary."""
    size = load_config(path).vocab_size
    if size != config.vocab_size:
        raise ValueError(
            f"the teacher has {size} tokens, the model {config.vocab_size}; their predictions can "
            "be compared over one vocabulary only"
        )
    where = tokenizer_dir(path)
    if where is not None:
        theirs = load_tokenizer(where).hf.get_vocab()
        if theirs != tokenizer.hf.get_vocab():
            raise ValueError(f"the tokenizer of the teacher {path} is not that of the model")


def _prompts(
    tokenizer: TextTokenizer, documents: Sequence[str], items: int | None
) -> list[list[int]]:
    begin = start(tokenizer).ids
    found = []
    for text in documents[: items or PROMPTS]:
        ids: list[Any] = [*begin, *tokenizer.encode(text[: 16 * PROMPT]).tolist()]
        if ids:
            found.append(ids[:PROMPT])
    return found
