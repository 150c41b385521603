"""What the untouched teacher can do: tasks at several lengths and difficulties.

A task says something about layers only where the teacher is neither at the bottom nor at the top,
so its difficulty is to be one at which the teacher scores 60 to 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.pilot.ledger import Ledger
from benchmarks.pilot.material import Material
from jet_jax.evaluation import retrieval
from jet_jax.evaluation.arithmetic import arithmetic
from jet_jax.evaluation.choices import cloze
from jet_jax.evaluation.harness import evaluate
from jet_jax.evaluation.rows import Rows

# Task -> its generator and the settings to try, the project's own default among them.
TASKS: dict[str, tuple[Callable[..., Rows], list[dict[str, Any]]]] = {
    "mqar": (retrieval.mqar, [{"num_pairs": n} for n in (4, 8, 16, 32)]),
    "phone_book": (retrieval.phone_book, [{"num_entries": n} for n in (5, 10, 20, None)]),
    "needle": (retrieval.needle, [{"num_needles": n} for n in (1, 4, 8)]),
    "copy": (retrieval.copy, [{"span": n} for n in (1, 8)]),
    "extraction": (retrieval.extraction, [{"span": n} for n in (1, 4, 8)]),
    "cloze": (cloze, [{}, {"is_repeated": True}]),
    "addition": (arithmetic, [{"digits": n} for n in (1, 2)]),
    "subtraction": (arithmetic, [{"kind": "subtraction", "digits": n} for n in (1, 2)]),
    "chain": (arithmetic, [{"kind": "chain", "digits": 1, "steps": n} for n in (1, 2, 3)]),
}
OF_DOCUMENTS = ("extraction", "cloze")
ONE_LENGTH = ("addition", "subtraction", "chain")  # short texts that share rows
SCORED = {"mqar": 4, "extraction": 1}  # retrieval of the arms, and questions a text
EDGES = (32, 64, 128, 256, 512, 1024)
WANTED = 0.8  # the middle of what a gate lets through
BATCH_TOKENS = 32_768


def make_rows(
    material: Material, task: str, length: int, texts: int, options: dict[str, Any]
) -> Rows:
    """A task's rows of the split "search", of all held-out documents where it needs some.

    Raises:
      ValueError: a length or a text that does not fit.
    """
    function, _ = TASKS[task]
    if task in OF_DOCUMENTS:
        return function(
            material.tokenizer, material.documents, 0, texts, length, split=None, **options
        )
    return function(material.tokenizer, 0, texts, length, split="search", **options)


def gate(material: Material, task: str, length: int) -> dict[str, Any]:
    """The teacher's accuracy in a task's settings at a length, with its standard error."""
    found = []
    for options in TASKS[task][1]:
        material.clock.check()
        result: dict[str, Any] = {"options": options}
        try:
            rows = make_rows(material, task, length, material.sizes.texts, options)
        except ValueError as error:
            found.append(result | {"note": str(error)})
            continue
        scored = evaluate(material.model, rows, _batch_size(material, length))
        p, n = scored["accuracy"], scored["questions"]
        error = math.sqrt(p * (1 - p) / n)
        found.append(
            result | {"accuracy": p, "error": error, "questions": n, "loss": scored["loss"]}
        )
    return {"length": length, "settings": found}


def _batch_size(material: Material, length: int) -> int:
    """Rows at a time, the same for all tasks of a length: one program serves them."""
    return max(1, min(BATCH_TOKENS // length, material.sizes.texts))


def by_position(material: Material) -> dict[str, Any]:
    """The teacher's nats a token and perplexity on held-out text, by how much text precedes."""
    length = material.sizes.path[1]
    rows = material.text(3 * material.sizes.text_rows)
    scored = evaluate(material.model, rows, _batch_size(material, length), edges=EDGES)
    return {
        "documents": rows.num_items,
        "buckets": {
            name: {"tokens": x["tokens"], "nll": x["nll"], "perplexity": math.exp(x["nll"])}
            for name, x in scored["buckets"].items()
        },
    }


def retrieval_of(material: Material, ledger: Ledger) -> dict[str, Any]:
    """The settings of the arms' retrieval: those nearest to 80 %, a default without gates.

    Chosen once and kept in the ledger, so that all arms are scored on the same questions.
    """
    if "retrieval" not in ledger:
        length = material.sizes.lengths[min(1, len(material.sizes.lengths) - 1)]
        chosen: dict[str, Any] = {}
        for task in SCORED:
            name = f"gates/{task}/{length}"
            tried = ledger[name]["settings"] if name in ledger else []
            tried = [x for x in tried if "accuracy" in x]
            default = TASKS[task][1][0]
            best = min(tried, key=lambda x: abs(x["accuracy"] - WANTED), default=None)
            chosen[task] = {"length": length, "options": best["options"] if best else default}
        ledger.put("retrieval", {"tasks": chosen})
    return ledger["retrieval"]["tasks"]


def retrieval_rows(material: Material, ledger: Ledger) -> dict[str, Rows]:
    """The rows of `retrieval_of`, as many questions each."""
    count = material.sizes.questions
    return {
        task: make_rows(material, task, x["length"], max(1, count // SCORED[task]), x["options"])
        for task, x in retrieval_of(material, ledger).items()
    }
