"""Scores models on rows, beside a teacher if there is one, and lets them run freely."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jet_jax.evaluation.rows import Passage, Rows, pack
from jet_jax.evaluation.scoring import (
    EDGES,
    item_sums,
    perplexity_by_bucket,
    summarise,
    summarise_buckets,
    token_scores,
)
from jet_jax.generation import generate
from jet_jax.models.lm import HybridLM
from jet_jax.params import split


class Forward(NamedTuple):
    """A model as a function and what it takes, for models that are not a `HybridLM`.

    Attributes:
      apply: `apply(params, batch) -> (hidden, head)`, traceable, where `batch` is one of
        `Rows.batches`, hidden [B,T,D] comes after the final norm and head is [D,E]. Pass the same
        function again, or an equal one, and nothing is compiled again.
      params: any pytree of arrays.
    """

    apply: Callable[[Any, Mapping[str, Any]], tuple[Any, Any]]
    params: Any


@dataclasses.dataclass(frozen=True)
class _Apply:
    """A `HybridLM` without its weights; equal for models of equal structure."""

    graphdef: Any

    def __call__(self, params: Any, batch: Mapping[str, Any]) -> tuple[Any, Any]:
        model = nnx.merge(self.graphdef, params)
        segment_ids = batch["segment_ids"]
        out = model.forward(batch["tokens"], segment_ids=segment_ids, logits_at="none")
        return out.hidden, model.head_kernel()


def forward_of(model: HybridLM | Forward) -> Forward:
    """A model as `Forward`, its weights shared."""
    if isinstance(model, Forward):
        return model
    graphdef, params = split(model)
    return Forward(_Apply(graphdef), params)


def evaluate(
    model: HybridLM | Forward,
    rows: Rows,
    batch_size: int = 8,
    teacher: HybridLM | Forward | None = None,
    *,
    edges: Sequence[int] = EDGES,
) -> dict[str, Any]:
    """Scores a set of rows, or documents as `perplexity_rows` makes rows of them.

    Args:
      model: what to score.
      rows: the set.
      batch_size: rows at a time.
      teacher: predictions to compare with, over the same vocabulary.
      edges: of the position buckets, as in `perplexity_by_bucket`.

    Returns:
      What `summarise` gives, and `buckets`: the means over the scored tokens by position, as
      `summarise_buckets` gives them. With a teacher also `kl`, the mean KL(teacher || model) of
      the scored tokens in nats, and `agreement`, the share of them whose likeliest token is the
      teacher's.

    Raises:
      ValueError: a batch size below 1, or a teacher with another vocabulary.
    """
    apply, params = forward_of(model)
    teacher_apply, teacher_params = (None, None) if teacher is None else forward_of(teacher)
    static = (apply, teacher_apply, rows.num_items, tuple(edges))
    total: Any = None
    for batch in rows.batches(batch_size):
        sums = jax.device_get(_sums(*static, params, teacher_params, batch))
        sums = jax.tree.map(lambda x: x.astype(np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    items, buckets = total
    result = summarise(rows, items)
    result["buckets"] = summarise_buckets(buckets, edges)
    if teacher is not None:
        overall = result["buckets"]["all"]
        result |= {"kl": overall["kl"], "agreement": overall["agree"]}
    return result


def _sums(apply, teacher_apply, num_items, edges, params, teacher_params, batch):
    """Two programs, so that the model is not compiled anew for another number of items."""
    scores = _scores(apply, teacher_apply, params, teacher_params, batch)
    return _add_up(num_items, edges, scores, batch["answers"], batch["positions"])


@partial(jax.jit, static_argnums=(0, 1))
def _scores(apply, teacher_apply, params, teacher_params, batch):
    arguments = [*apply(params, batch), batch["targets"]]
    if teacher_apply is not None:
        arguments += teacher_apply(teacher_params, batch)
    return token_scores(*arguments)


@partial(jax.jit, static_argnums=(0, 1))
def _add_up(num_items, edges, scores, answers, positions):
    by_position = perplexity_by_bucket(scores, positions, answers > 0, edges)
    return item_sums(scores, answers, num_items), by_position


def free_running(
    model: HybridLM,
    teacher: HybridLM,
    prompts: Sequence[Sequence[int]],
    new_tokens: int = 64,
    *,
    key: Any = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Compares what two models write when nothing corrects them.

    Args:
      model: the student.
      teacher: over the same vocabulary.
      prompts: token ids, of any lengths.
      new_tokens: how many tokens each writes; nothing ends a text before.
      key: JAX key of the samples, the same for both models.
      batch_size: rows scored at a time.

    Returns:
      `agreed`: mean number of greedy tokens before the student leaves the teacher's greedy text.
      `student_nll` and `teacher_nll`: the teacher's mean nats a token for what the student and
      the teacher itself sample at temperature 1; their difference is what the student's own
      errors cost. `per_prompt`: the three as arrays.

    Raises:
      ValueError: no prompts, or one that generation does not take.
    """
    if not len(prompts):
        raise ValueError("free_running: the list of prompts is empty; give at least one")
    greedy = [
        np.asarray(generate(m, prompts, new_tokens, eos_id=()), np.int32) for m in (model, teacher)
    ]
    same = np.cumprod(greedy[0] == greedy[1], axis=1)
    figures = {"agreed": same.sum(1).astype(np.float64)}
    length = max(len(prompt) for prompt in prompts) + new_tokens - 1
    for name, writer in (("student_nll", model), ("teacher_nll", teacher)):
        texts = generate(writer, prompts, new_tokens, temperature=1.0, eos_id=(), key=key)
        passages = [Passage(p).ask(text) for p, text in zip(prompts, texts, strict=True)]
        scored = evaluate(teacher, pack(passages, length, name=name), batch_size)
        figures[name] = -scored["per_item"]["logprob"] / new_tokens
    return {**{name: float(x.mean()) for name, x in figures.items()}, "per_prompt": figures}
