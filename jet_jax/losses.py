"""Cross-entropy and token log-probabilities that never hold the logits of a whole batch.

With a vocabulary of 151,936 the float32 logits of 8192 tokens take 5 GB. The head therefore runs
over chunks of T: each chunk's logits are made, used and dropped.

`cross_entropy` has its own derivative. A summed loss has a gradient that is linear in one incoming
scalar, so the pass that computes the loss also computes `d hidden` and `d head` while each chunk's
logits are at hand; the backward pass only multiplies. That is three matrix products a chunk, where
recomputing the logits backward would take four. Under a mesh every batch shard adds up its own
`d head` over the chunks, and the shards are summed once at the end, not once a chunk.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jet_jax.sharding import constrain, current_batch_shards

MAX_LOGITS = 2**28  # logits that a chunk may hold on one device (1 GiB in float32)


def cross_entropy(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D E"],
    targets: Int[Array, "B T"],
    mask: Float[Array, "B T"],
    *,
    z_loss: float = 0.0,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Sums the next-token cross-entropy of a batch, in nats.

    Logits are `hidden @ head`, multiplied in `hidden.dtype` and accumulated in float32; softmax,
    loss and the head's gradient are float32. The head is cast inside, so a float32 master weight
    gets a float32 gradient.

    Args:
      hidden: output of the final norm, the compute dtype.
      head: head matrix, usually the float32 master (the transposed embedding when tied).
      targets: token to predict at each position, int32 in [0, E).
      mask: weight of each position; 0 leaves it out of loss and counts. Gets no gradient.
      z_loss: coefficient of the mean squared log-partition (PaLM, arXiv:2204.02311 §5), which
        keeps logits from drifting; 0 leaves it out.
      max_logits: logits that a chunk may hold on one device; sets the chunk length.

    Returns:
      `(total, sums)`. `total` is the summed loss, the z term included, and carries the gradient
      for `hidden` and `head`. `sums` holds, without gradient: `loss` (summed cross-entropy),
      `tokens` (sum of the mask) and `correct` (masked count of top-1 hits).
    """
    shards = current_batch_shards(hidden.shape[0])
    chunk = _chunk_length(hidden.shape, head.shape[1], shards, max_logits)
    out: Any = _summed_loss(hidden, head, targets, mask, z_loss, chunk, shards)
    total, sums = out
    return total, jax.tree.map(jax.lax.stop_gradient, sums)


def token_logprobs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D E"],
    targets: Int[Array, "B T"],
    *,
    max_logits: int = MAX_LOGITS,
) -> Float[Array, "B T"]:
    """Computes the log-probability of each target token, in nats, float32.

    Args:
      hidden: output of the final norm.
      head: head matrix; cast to `hidden.dtype` for the product.
      targets: token ids, int32 in [0, E).
      max_logits: logits that a chunk may hold on one device.

    Returns:
      `log softmax(hidden @ head)[targets]`. Differentiable, recomputing logits chunk by chunk.
    """
    shards = current_batch_shards(hidden.shape[0])
    chunk = _chunk_length(hidden.shape, head.shape[1], shards, max_logits)
    head = constrain(head.astype(hidden.dtype), "de")

    @jax.checkpoint
    def one(args):
        h, y = args
        logits = _logits(h, head)
        return _target_logit(logits, y) - jax.nn.logsumexp(logits, axis=-1)

    out = jax.lax.map(one, (_split(hidden, chunk, shards), _split(targets, chunk, shards)))
    return _join(out, hidden.shape[1])


def token_kl(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D E"],
    teacher_hidden: Float[Array, "B T C"],
    teacher_head: Float[Array, "C E"],
    *,
    max_logits: int = MAX_LOGITS,
) -> Float[Array, "B T"]:
    """Computes KL(teacher || student) of the next-token distributions, in nats, float32.

    Args:
      hidden: the student's output of the final norm.
      head: its head matrix; cast to `hidden.dtype` for the product.
      teacher_hidden: the teacher's; gets no gradient.
      teacher_head: the teacher's head matrix; gets no gradient.
      max_logits: logits that a chunk may hold on one device, the teacher's included.

    Returns:
      One number a position, at least 0 up to rounding, and exactly 0 where the two models are the
      same arrays. Differentiable, recomputing logits chunk by chunk.
    """
    shards = current_batch_shards(hidden.shape[0])
    chunk = _chunk_length(hidden.shape, head.shape[1], shards, max_logits // 2)
    head = constrain(head.astype(hidden.dtype), "de")
    teacher_hidden, teacher_head = jax.lax.stop_gradient((teacher_hidden, teacher_head))
    teacher_head = constrain(teacher_head.astype(teacher_hidden.dtype), "de")

    @jax.checkpoint
    def one(args):
        student, teacher = args
        log_q = jax.nn.log_softmax(_logits(student, head))
        log_p = jax.nn.log_softmax(_logits(teacher, teacher_head))
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    out = jax.lax.map(one, tuple(_split(x, chunk, shards) for x in (hidden, teacher_hidden)))
    return _join(out, hidden.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _summed_loss(hidden, head, targets, mask, z_loss, chunk, shards):
    head = constrain(head.astype(hidden.dtype), "de")  # gathered here, once

    def one(sums, xs):
        h, y, m = xs
        total, stats, _ = _chunk_loss(_logits(h, head), y, m, z_loss)
        return jax.tree.map(jnp.add, sums, (total, stats)), None

    xs = tuple(_split(x, chunk, shards) for x in (hidden, targets, mask))
    (total, sums), _ = jax.lax.scan(one, _zero_sums(), xs)
    return total, sums


def _summed_loss_fwd(hidden, head, targets, mask, z_loss, chunk, shards):
    master_dtype = jnp.zeros((), head.dtype)  # a residual must be an array
    head = constrain(head.astype(hidden.dtype), "de")

    def one(carry, xs):
        sums, d_head = carry
        h, y, m = xs
        total, stats, d_logits = _chunk_loss(_logits(h, head), y, m, z_loss)
        d_logits = d_logits.astype(h.dtype)
        precision = _precision(h)
        d_h = jnp.einsum("nbte,de->nbtd", d_logits, head, precision=precision)
        d_head += jnp.einsum(
            "nbtd,nbte->nde", h, d_logits, precision=precision, preferred_element_type=jnp.float32
        )
        return (jax.tree.map(jnp.add, sums, (total, stats)), constrain(d_head, "bde")), d_h

    xs = tuple(_split(x, chunk, shards) for x in (hidden, targets, mask))
    d_head = constrain(jnp.zeros((shards, *head.shape), jnp.float32), "bde")
    ((total, sums), d_head), d_hidden = jax.lax.scan(one, (_zero_sums(), d_head), xs)
    d_hidden = _join(d_hidden, hidden.shape[1])
    return (total, sums), (d_hidden, d_head, master_dtype)


def _summed_loss_bwd(z_loss, chunk, shards, residuals, cotangents):
    d_hidden, d_head, master_dtype = residuals
    scale, _ = cotangents  # the sums carry no gradient
    batch_time = d_hidden.shape[:2]
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_head.sum(0) * scale).astype(master_dtype.dtype),
        np.zeros(batch_time, jax.dtypes.float0),
        jnp.zeros(batch_time, jnp.float32),
    )


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _chunk_loss(logits, targets, mask, z_loss):
    """Loss, counts and gradient with respect to the logits [N,B,T,E] of one chunk."""
    top = logits.max(-1)
    exp = jnp.exp(logits - top[..., None])
    partition = exp.sum(-1)
    log_z = top + jnp.log(partition)
    hit = _target_logit(logits, targets)
    loss = ((log_z - hit) * mask).sum()
    total = loss + z_loss * (log_z**2 * mask).sum()
    stats = {"loss": loss, "tokens": mask.sum(), "correct": ((hit >= top) * mask).sum()}
    # d total / d logits = mask * ((1 + 2 z log Z) softmax - onehot)
    slope = (1 + 2 * z_loss * log_z) / partition
    onehot = jnp.arange(logits.shape[-1]) == targets[..., None]
    d_logits = (exp * slope[..., None] - onehot) * mask[..., None]
    return total, stats, d_logits


def _precision(x):
    # float32 means float32: a GPU would otherwise multiply in TF32.
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _logits(h, head):
    logits = jnp.einsum(
        "nbtd,de->nbte", h, head, precision=_precision(h), preferred_element_type=jnp.float32
    )
    return constrain(logits, "btte")


def _target_logit(logits, targets):
    # A masked sum, not a gather: it stays local where the vocabulary is split over devices.
    onehot = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(onehot, logits, 0.0).sum(-1)


def _zero_sums():
    zero = jnp.zeros((), jnp.float32)
    return zero, {"loss": zero, "tokens": zero, "correct": zero}


def _chunk_length(shape, vocab, shards, max_logits):
    rows, time = shape[0] // shards, shape[1]
    most = max(1, max_logits // (rows * vocab))
    return math.ceil(time / math.ceil(time / most))  # equal chunks, least padding


def _split(x, chunk, shards):
    """[B,T,...] -> [chunks, shards, B/shards, chunk, ...]; T is padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(shards, x.shape[0] // shards, -1, chunk, *x.shape[2:])
    return constrain(jnp.moveaxis(x, 2, 0), "tbtt" + "d" * (x.ndim - 4))


def _join(x, time):
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 2)
    x = x.reshape(x.shape[0] * x.shape[1], -1, *x.shape[4:])[:, :time]
    return constrain(x, "bt" + "d" * (x.ndim - 2))
