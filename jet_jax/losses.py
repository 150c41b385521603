"""Cross-entropy, KL and token log-probabilities that never hold the logits of a whole batch.

The head runs over chunks of T (`jet_jax.head_chunks`). A summed loss has a gradient that is linear
in one incoming scalar, so `cross_entropy` and `kl_loss` compute `d hidden` and `d head` in the pass
that computes the loss, while each chunk's logits are at hand; the backward pass only multiplies.
That is one product less a chunk and model than recomputing logits backward. A frozen head gets no
gradient, which is another one less. Under a mesh every batch shard adds up its own `d head` over
the chunks, and the shards are summed once at the end, not once a chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jet_jax.head_chunks import (
    MAX_LOGITS,
    Chunks,
    cast_head,
    logits_of,
    map_logits,
    precision,
    target_logit,
)
from jet_jax.sharding import constrain


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
    chunks = Chunks.of(hidden, head, max_logits)
    chunk_loss = partial(_cross_entropy, z_loss)
    out: Any = _summed_loss(chunk_loss, chunks, hidden, head, (targets, mask), ())
    total, sums = out
    return total, jax.tree.map(jax.lax.stop_gradient, sums)


def kl_loss(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "D E"],
    teacher_hidden: Float[Array, "B T C"],
    teacher_head: Float[Array, "C E"],
    mask: Float[Array, "B T"],
    *,
    max_logits: int = MAX_LOGITS,
) -> Float[Array, ""]:
    """Sums KL(teacher || student) of the next-token distributions of a batch, in nats, float32.

    Three products a chunk where the head is frozen, four where it trains.

    Args:
      hidden: the student's output of the final norm, the compute dtype.
      head: its head matrix, as in `cross_entropy`.
      teacher_hidden: the teacher's; gets no gradient.
      teacher_head: the teacher's head matrix; gets no gradient.
      mask: weight of each position. Gets no gradient.
      max_logits: logits that a chunk may hold on one device, the teacher's included.

    Returns:
      At least 0 up to rounding; value and gradient are exactly 0 where the two models are the same
      arrays. Carries the gradient for `hidden` and `head`.
    """
    chunks = Chunks.of(hidden, head, max_logits // 2)
    teacher_head = cast_head(teacher_head, teacher_hidden)
    out: Any = _summed_loss(_kl, chunks, hidden, head, (teacher_hidden, mask), (teacher_head,))
    return out[0]


def kl_divergence(
    logits: Float[Array, "*B E"], teacher_logits: Float[Array, "*B E"]
) -> Float[Array, "*B"]:
    """KL(teacher || student) of two distributions given by logits, in nats, float32."""
    return _kl_and_slope(logits, teacher_logits)[0]


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
    return map_logits(target_logprob, [(hidden, head)], targets, max_logits=max_logits)


def target_logprob(logits: Float[Array, "*B E"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """`log softmax(logits)[..., targets]`, in nats."""
    return target_logit(logits, targets) - jax.nn.logsumexp(logits, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_loss(chunk_loss, chunks, hidden, head, rows, shared):
    """Sums `chunk_loss(logits, rows of the chunk, shared)` over all chunks.

    `chunk_loss` returns a scalar, a tree of scalars and d scalar / d logits. Only `hidden` and
    `head` get gradients.
    """
    head = cast_head(head, hidden)

    def one(sums, xs):
        h, parts = xs
        *new, _ = chunk_loss(logits_of(h, head), parts, shared)
        return jax.tree.map(jnp.add, sums, tuple(new)), None

    xs = jax.tree.map(chunks.split, (hidden, rows))
    return jax.lax.scan(one, _zero_sums(chunk_loss, head, xs, shared), xs)[0]


def _summed_loss_fwd(chunk_loss, chunks, hidden, head, rows, shared):
    head_trains = head.perturbed
    hidden, head, rows, shared = jax.custom_derivatives.custom_vjp_primal_tree_values(
        (hidden, head, rows, shared)
    )
    master_dtype = jnp.zeros((), head.dtype)  # a residual must be an array
    head = cast_head(head, hidden)

    def one(carry, xs):
        sums, d_head = carry
        h, parts = xs
        *new, d_logits = chunk_loss(logits_of(h, head), parts, shared)
        d_logits = d_logits.astype(h.dtype)
        d_h = jnp.einsum("nbte,de->nbtd", d_logits, head, precision=precision(h))
        if head_trains:
            d_head += jnp.einsum(
                "nbtd,nbte->nde",
                h,
                d_logits,
                precision=precision(h),
                preferred_element_type=jnp.float32,
            )
            d_head = constrain(d_head, "bde")
        return (jax.tree.map(jnp.add, sums, tuple(new)), d_head), d_h

    xs = jax.tree.map(chunks.split, (hidden, rows))
    d_head = None
    if head_trains:
        d_head = constrain(jnp.zeros((chunks.shards, *head.shape), jnp.float32), "bde")
    start = _zero_sums(chunk_loss, head, xs, shared), d_head
    (sums, d_head), d_hidden = jax.lax.scan(one, start, xs)
    return sums, (chunks.join(d_hidden), d_head, master_dtype)


def _summed_loss_bwd(chunk_loss, chunks, residuals, cotangents):
    del chunk_loss, chunks
    d_hidden, d_head, master_dtype = residuals
    scale, _ = cotangents  # the sums carry no gradient
    d_hidden = (d_hidden * scale).astype(d_hidden.dtype)
    if d_head is not None:
        d_head = (d_head.sum(0) * scale).astype(master_dtype.dtype)
    return d_hidden, d_head, None, None


# Symbolic zeros tell whether the head trains.
_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd, symbolic_zeros=True)


def _zero_sums(chunk_loss, head, xs, shared):
    def first(xs):
        h, parts = jax.tree.map(lambda x: x[0], xs)
        return tuple(chunk_loss(logits_of(h, head), parts, shared)[:2])

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(first, xs))


def _cross_entropy(z_loss, logits, rows, shared):
    """Loss, counts and gradient with respect to the logits [N,B,T,E] of one chunk."""
    del shared
    targets, mask = rows
    top = logits.max(-1)
    exp = jnp.exp(logits - top[..., None])
    partition = exp.sum(-1)
    log_z = top + jnp.log(partition)
    hit = target_logit(logits, targets)
    loss = ((log_z - hit) * mask).sum()
    total = loss + z_loss * (log_z**2 * mask).sum()
    stats = {"loss": loss, "tokens": mask.sum(), "correct": ((hit >= top) * mask).sum()}
    # d total / d logits = mask * ((1 + 2 z log Z) softmax - onehot)
    slope = (1 + 2 * z_loss * log_z) / partition
    onehot = jnp.arange(logits.shape[-1]) == targets[..., None]
    d_logits = (exp * slope[..., None] - onehot) * mask[..., None]
    return total, stats, d_logits


def _kl(logits, rows, shared):
    """The summed KL of one chunk and its gradient with respect to the logits [N,B,T,E]."""
    teacher_hidden, mask = rows
    (teacher_head,) = shared
    kl, slope = _kl_and_slope(logits, logits_of(teacher_hidden, teacher_head))
    return (kl * mask).sum(), {}, slope * mask[..., None]


def _kl_and_slope(logits, teacher_logits):
    """KL(teacher || student), and its gradient with respect to the student's logits: q - p.

    One pass over the logits for the maxima and one for all sums.
    """
    x, y = (z - jax.lax.stop_gradient(z.max(-1, keepdims=True)) for z in (logits, teacher_logits))
    exp_x, exp_y = jnp.exp(x), jnp.exp(y)
    sum_x, sum_y = exp_x.sum(-1), exp_y.sum(-1)
    # log(sum_x / sum_y); near 1 by the sum of differences, which is 0 for equal logits whatever
    # order the compiler adds each sum up in.
    change = (exp_x - exp_y).sum(-1) / sum_y
    near = jnp.log1p(jnp.clip(change, -0.5, 0.5))
    log_ratio = jnp.where(jnp.abs(change) < 0.5, near, jnp.log(sum_x / sum_y))
    kl = (exp_y * (y - x)).sum(-1) / sum_y + log_ratio
    return kl, exp_x / sum_x[..., None] - exp_y / sum_y[..., None]
