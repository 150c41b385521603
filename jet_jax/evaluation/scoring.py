"""From hidden states to figures: scores of tokens, sums over answers and position buckets.

`token_scores`, `item_sums` and `perplexity_by_bucket` are for jit, and their sums add up over
batches and devices; `summarise` and `summarise_buckets` make figures of the sums on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jet_jax.evaluation.rows import Rows
from jet_jax.head_chunks import MAX_LOGITS, map_logits
from jet_jax.losses import kl_divergence, target_logprob

EDGES = (128, 512, 2048)  # positions that begin a new bucket


def token_scores(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D E"],
    targets: Int[Array, "B T"],
    teacher_hidden: Float[Array, "B T G"] | None = None,
    teacher_head: Float[Array, "G E"] | None = None,
    *,
    max_logits: int = MAX_LOGITS,
) -> dict[str, Array]:
    """Scores each target token, and each position against a teacher's prediction.

    The logits, `hidden @ head` as in `jet_jax.losses`, exist for one chunk of T at a time.

    Args:
      hidden: output of the final norm.
      head: head matrix; cast to `hidden.dtype` for the product.
      targets: token ids, int32 in [0, E).
      teacher_hidden: the teacher's, of any width; None for no teacher.
      teacher_head: the teacher's head over the same vocabulary.
      max_logits: logits that a chunk may hold on one device, the teacher's included.

    Returns:
      [B,T] arrays. `logprob`: float32, of the target, in nats. `correct`: bool, the target is the
      likeliest token, the first of equals, as in greedy generation. With a teacher also `kl`:
      float32, KL(teacher || student) over the vocabulary in nats; `agree`: bool, both have the
      same likeliest token; `teacher_logprob`: float32, of the target, in nats.

    Raises:
      ValueError: half a teacher, or one with another vocabulary.
    """
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("give both teacher_hidden and teacher_head, or neither")
    pairs = [(hidden, head)]
    if teacher_hidden is not None and teacher_head is not None:
        if teacher_head.shape[1] != head.shape[1]:
            raise ValueError(
                f"the teacher's head has {teacher_head.shape[1]} tokens, the student's "
                f"{head.shape[1]}; their predictions can be compared over one vocabulary only"
            )
        pairs.append((teacher_hidden, teacher_head))

    def one(logits, *others):
        *teachers, y = others
        best = logits.argmax(-1)
        out = {"logprob": target_logprob(logits, y), "correct": best == y}
        for teacher in teachers:
            out["kl"] = kl_divergence(logits, teacher)
            out["agree"] = best == teacher.argmax(-1)
            out["teacher_logprob"] = target_logprob(teacher, y)
        return out

    return map_logits(one, pairs, targets, max_logits=max_logits)


def item_sums(
    scores: Mapping[str, Array], answers: Int[Array, "B T"], num_items: int
) -> dict[str, Float[Array, " items"]]:
    """Adds scores up over the tokens of each answer.

    Args:
      scores: what `token_scores` returns.
      answers: as in `Rows`: 0, or the number of an answer from 1 to `num_items`.
      num_items: static under jit.

    Returns:
      float32: `logprob` of the answer in nats, its `tokens` in these rows, and how many of them
      are `wrong`, that is not the likeliest token; with a teacher also `kl` and
      `teacher_logprob`. Sums of several batches add up.
    """
    one = jnp.ones(answers.shape, jnp.float32)
    values = {
        "logprob": scores["logprob"],
        "tokens": one,
        "wrong": jnp.where(scores["correct"], 0.0, one),
        **{name: scores[name] for name in ("kl", "teacher_logprob") if name in scores},
    }
    at = answers.reshape(-1)
    return {
        name: jax.ops.segment_sum(x.reshape(-1), at, num_segments=num_items + 1)[1:]
        for name, x in values.items()
    }


def perplexity_by_bucket(
    scores: Mapping[str, Array],
    positions: Int[Array, "B T"],
    mask: Array,
    edges: Sequence[int] = EDGES,
) -> dict[str, Float[Array, " buckets"]]:
    """Adds scores up by how much context a position has.

    Args:
      scores: what `token_scores` returns.
      positions: of the tokens in their segments, from 0.
      mask: [B,T], positions to count.
      edges: rising; bucket i holds the positions from `edges[i-1]` to `edges[i] - 1`.

    Returns:
      float32: `tokens`, `nll` (minus the log-probability of the targets, in nats) and `correct`;
      with a teacher also `kl`, `agree` and `teacher_nll`. Sums of several batches add up.
    """
    values = {"tokens": jnp.ones(positions.shape), "nll": -scores["logprob"]}
    values["correct"] = scores["correct"]
    if "kl" in scores:
        values |= {"kl": scores["kl"], "agree": scores["agree"]}
        values["teacher_nll"] = -scores["teacher_logprob"]
    bucket = jnp.searchsorted(jnp.asarray(edges), positions, side="right").reshape(-1)
    return {
        name: jax.ops.segment_sum(
            jnp.where(mask, x, 0).astype(jnp.float32).reshape(-1),
            bucket,
            num_segments=len(edges) + 1,
        )
        for name, x in values.items()
    }


def summarise(rows: Rows, sums: Mapping[str, Any]) -> dict[str, Any]:
    """Makes figures of an answer's sums.

    Args:
      rows: the set.
      sums: `item_sums`, added up over all of its batches.

    Returns:
      `accuracy`: for free answers the share whose every token is the likeliest, which is what
      greedy generation gives; for choices the share of questions whose right choice has the
      highest log-probability (a tie is wrong). `loss`: mean over questions of minus the
      log-probability of the right answer, in nats. `items` and `questions`: their numbers.
      For choices also `accuracy_norm`, by the log-probability a token, and `choice_loss`: mean
      cross-entropy of the softmax over a question's choices. `per_item`: the sums as arrays.
      `per_question`, in the order of group numbers: arrays `correct` (bool) and `loss`, for
      choices also `correct_norm`, `choice_loss` and `chosen`, the likeliest item from 0.

    Raises:
      ValueError: the sums are not those of all tokens of these items.
    """
    per_item = {name: np.asarray(x, np.float64) for name, x in sums.items()}
    expected = np.bincount(rows.answers.reshape(-1), minlength=rows.num_items + 1)[1:]
    if not np.array_equal(per_item["tokens"], expected):
        raise ValueError(
            f"{rows.name}: the sums cover {per_item['tokens'].sum():.0f} answer tokens, the rows "
            f"hold {expected.sum()}; add up item_sums over every batch once"
        )
    logprob, right = per_item["logprob"], rows.right
    _, group = np.unique(rows.groups, return_inverse=True)
    order = np.argsort(group[right])  # the right items in the order of their questions
    per_question: dict[str, np.ndarray] = {"loss": -logprob[right][order]}
    chosen = {}
    if rows.has_choices:
        for name, score in (("correct", logprob), ("correct_norm", logprob / expected)):
            rival = np.full(len(order), -np.inf)
            np.maximum.at(rival, group[~right], score[~right])
            per_question[name] = score[right][order] > rival
        best = np.full(len(order), -np.inf)
        np.maximum.at(best, group, logprob)
        partition = np.bincount(group, np.exp(logprob - best[group]))
        per_question["choice_loss"] = best + np.log(partition) + per_question["loss"]
        by_score = np.lexsort((-logprob, group))  # the best of each question comes first
        chosen["chosen"] = by_score[np.unique(group[by_score], return_index=True)[1]]
    else:
        per_question["correct"] = (per_item["wrong"] == 0)[order]
    names = {"correct": "accuracy", "correct_norm": "accuracy_norm"}
    return {
        **{names.get(name, name): float(x.mean()) for name, x in per_question.items()},
        "items": float(rows.num_items),
        "questions": float(len(order)),
        "per_item": per_item,
        "per_question": per_question | chosen,
    }


def summarise_buckets(
    sums: Mapping[str, Any], edges: Sequence[int] = EDGES
) -> dict[str, dict[str, float]]:
    """Makes means a token of what `perplexity_by_bucket` returns, a bucket and over all.

    Returns:
      "0-127", "128-511", … and "all" to `tokens` and the means of the other sums; buckets without
      tokens are left out.
    """
    table = {name: np.asarray(x, np.float64) for name, x in sums.items()}
    starts = (0, *edges)
    names = [f"{a}-{b - 1}" for a, b in zip(starts, edges, strict=False)] + [f"{starts[-1]}-"]
    columns = {n: {k: x[i] for k, x in table.items()} for i, n in enumerate(names)}
    columns["all"] = {k: x.sum() for k, x in table.items()}
    return {
        name: {k: float(x if k == "tokens" else x / sum_["tokens"]) for k, x in sum_.items()}
        for name, sum_ in columns.items()
        if sum_["tokens"]
    }
