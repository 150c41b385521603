"""The head over chunks of T, so that the logits of a whole batch never exist.

With a vocabulary of 151,936 the float32 logits of 8192 tokens take 5 GB. Each chunk's logits are
made, used and dropped. Under a mesh every batch shard cuts its own rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jet_jax.sharding import constrain, current_batch_shards

MAX_LOGITS = 2**28  # logits that a chunk may hold on one device (1 GiB in float32)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How arrays [B, T, ...] are cut.

    Attributes:
      length: tokens of a row in one chunk.
      shards: batch shards N; each holds B/N rows.
      time: T.
    """

    length: int
    shards: int
    time: int

    @classmethod
    def of(
        cls, hidden: Float[Array, "B T D"], head: Float[Array, "D E"], max_logits: int
    ) -> Chunks:
        """Cuts [B, T] such that a chunk's logits stay below `max_logits` on one device."""
        (batch, time, _), vocab = hidden.shape, head.shape[1]
        shards = current_batch_shards(batch)
        most = max(1, max_logits // (batch // shards * vocab))
        length = math.ceil(time / math.ceil(time / most))  # equal chunks, least padding
        return cls(length, shards, time)

    def split(self, x: Array) -> Array:
        """[B,T,...] -> [chunks, N, B/N, length, ...]; T is padded with zeros."""
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % self.length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(self.shards, x.shape[0] // self.shards, -1, self.length, *x.shape[2:])
        return constrain(jnp.moveaxis(x, 2, 0), "tbtt" + "d" * (x.ndim - 4))

    def join(self, x: Array) -> Array:
        """The inverse of `split`."""
        x = jnp.moveaxis(x, 0, 2)
        x = x.reshape(x.shape[0] * x.shape[1], -1, *x.shape[4:])[:, : self.time]
        return constrain(x, "bt" + "d" * (x.ndim - 2))


def map_logits(
    function: Callable[..., PyTree],
    models: Sequence[tuple[Float[Array, "B T _"], Float[Array, "_ E"]]],
    *rows: Array,
    max_logits: int = MAX_LOGITS,
) -> PyTree:
    """Applies a function to the logits of one or more models, chunk by chunk.

    Args:
      function: gets each model's logits [N,B,T,E] of a chunk, float32, then its part [N,B,T] of
        each of `rows`; returns a tree of arrays [N,B,T].
      models: `(hidden, head)` of each model, all over one vocabulary; the product is as in
        `logits_of`.
      *rows: arrays [B,T].
      max_logits: logits that a chunk may hold on one device, those of all models together.

    Returns:
      The tree, its arrays [B,T]. Differentiable, recomputing logits chunk by chunk.
    """
    chunks = Chunks.of(*models[0], max_logits // len(models))
    heads = [cast_head(w, h) for h, w in models]

    @jax.checkpoint
    def one(xs):
        states, parts = xs
        logits = [logits_of(h, w) for h, w in zip(states, heads, strict=True)]
        return function(*logits, *parts)

    xs = jax.tree.map(chunks.split, ([h for h, _ in models], rows))
    return jax.tree.map(chunks.join, jax.lax.map(one, xs))


def cast_head(head: Float[Array, "D E"], hidden: Array) -> Float[Array, "D E"]:
    """The head in `hidden.dtype`, gathered over `fsdp` once, before the chunks."""
    return constrain(head.astype(hidden.dtype), "de")


def logits_of(
    hidden: Float[Array, "N B T D"], head: Float[Array, "D E"]
) -> Float[Array, "N B T E"]:
    """`hidden @ head`, multiplied in their dtype and accumulated to float32."""
    logits = jnp.einsum(
        "nbtd,de->nbte",
        hidden,
        head,
        precision=precision(hidden),
        preferred_element_type=jnp.float32,
    )
    return constrain(logits, "btte")


def target_logit(logits: Float[Array, "*B E"], targets: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """`logits[..., targets]`."""
    # A masked sum, not a gather: it stays local where the vocabulary is split over devices.
    onehot = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jnp.where(onehot, logits, 0.0).sum(-1)


def precision(x: Array) -> jax.lax.Precision | None:
    """Precision of products of x: float32 means float32, a GPU would otherwise use TF32."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
