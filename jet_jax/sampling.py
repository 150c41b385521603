"""Choosing the next token: greedy, temperature, top-k and top-p as pure functions.

Temperature comes first, then top-k, then top-p on what top-k left (the order of Hugging Face's
logits processors). Nothing sorts the vocabulary: top-k takes `lax.top_k`, and top-p searches the
probability below which tokens are dropped.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

_ONE = 0x3F800000  # the bits of float32 1.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose tokens; `make_sampling` checks and builds it.

    The numbers are traced, so other values compile nothing; what is static is which steps there
    are, and `top_k` rounded up to a power of two.

    Attributes:
      temperature: float32 scalar.
      top_k: int32 scalar.
      top_p: float32 scalar.
      is_greedy: takes the likeliest token; everything else is then ignored.
      most_k: static upper bound of `top_k`, 0 without top-k.
      uses_top_p: whether top-p takes part.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    is_greedy: bool = dataclasses.field(metadata={"static": True})
    most_k: int = dataclasses.field(metadata={"static": True})
    uses_top_p: bool = dataclasses.field(metadata={"static": True})


def make_sampling(
    vocab_size: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Sampling:
    """Checks sampling parameters.

    Args:
      vocab_size: E.
      temperature: divides the logits; 0 is greedy.
      top_k: keep the k likeliest tokens, ties with the last one included; None keeps all.
      top_p: keep the likeliest tokens whose probabilities first reach this sum, ties with the last
        one included; None or 1 keeps all.

    Raises:
      ValueError: for a value out of its range, naming it and the range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature={temperature} must be a finite number >= 0; 0 is greedy decoding"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be an integer >= 1; leave it out to keep every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; leave it out to keep every token")
    greedy = temperature == 0
    k = 0 if greedy or top_k is None or top_k >= vocab_size else int(top_k)
    most_k = 0 if k == 0 else min(1 << (k - 1).bit_length(), vocab_size)
    return Sampling(
        temperature=np.float32(temperature),
        top_k=np.int32(k),
        top_p=np.float32(1 if top_p is None else top_p),
        is_greedy=greedy,
        most_k=most_k,
        uses_top_p=not greedy and top_p is not None and top_p < 1,
    )


def keep_top_k(
    logits: Float[Array, "B E"], top_k: Int[Array, ""], most_k: int
) -> Float[Array, "B E"]:
    """Sets all but the `top_k` largest logits of a row to -inf; ties with the last one stay.

    Args:
      logits: float32.
      top_k: between 1 and `most_k`.
      most_k: static bound, at most E.
    """
    largest = jax.lax.top_k(logits, most_k)[0]
    smallest_kept = jnp.take(largest, top_k - 1, axis=1)
    return jnp.where(logits >= smallest_kept[:, None], logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "B E"], top_p: Float[Array, ""]) -> Float[Array, "B E"]:
    """Keeps the smallest set of likeliest tokens that holds probability `top_p`, ties included.

    The threshold is the largest t with sum(p[p >= t]) >= top_p. That sum falls as t grows, and
    the bits of non-negative floats are ordered as the floats are, so 30 bisections over the bits
    find t exactly, each one pass over the logits.
    """
    # Relative to the likeliest token, which makes that one exactly 1 and never dropped.
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    target = top_p * jnp.sum(weights, axis=1)

    def halve(_, bounds):
        low, high = bounds  # the sum reaches the target at low, and not at high
        middle = (low + high) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        kept = jnp.sum(jnp.where(weights >= threshold[:, None], weights, 0), axis=1)
        reaches = kept >= target
        return jnp.where(reaches, middle, low), jnp.where(reaches, high, middle)

    rows = weights.shape[:1]
    low, _ = jax.lax.fori_loop(
        0, 30, halve, (jnp.zeros(rows, jnp.int32), jnp.full(rows, _ONE + 1, jnp.int32))
    )
    threshold = jax.lax.bitcast_convert_type(low, jnp.float32)
    return jnp.where(weights >= threshold[:, None], logits, -jnp.inf)


def filter_logits(logits: Float[Array, "B E"], sampling: Sampling) -> Float[Array, "B E"]:
    """Logits after temperature, top-k and top-p; dropped tokens are -inf."""
    # float32 cannot divide by much less; such temperatures are greedy but for exact ties.
    temperature = jnp.maximum(sampling.temperature, 1e-6)
    logits = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature
    if sampling.most_k:
        logits = keep_top_k(logits, sampling.top_k, sampling.most_k)
    if sampling.uses_top_p:
        logits = keep_top_p(logits, sampling.top_p)
    return logits


def sample(
    logits: Float[Array, "B E"],
    key: Array,
    requests: Int[Array, " B"],
    positions: Int[Array, " B"],
    sampling: Sampling,
) -> Int[Array, " B"]:
    """Chooses one token a row.

    A row's random numbers come from fold_in(fold_in(key, request), position) and from nothing
    else, so that a request's tokens do not depend on its neighbours in the batch.

    Args:
      logits: float32.
      key: a typed JAX key.
      requests: number of the request that each row serves.
      positions: position of the token to be chosen.
      sampling: from `make_sampling`.

    Returns:
      Token ids, int32.
    """
    if sampling.is_greedy:
        return jnp.argmax(logits, axis=1).astype(jnp.int32)

    def draw(row, request, position):
        row_key = jax.random.fold_in(jax.random.fold_in(key, request), position)
        return jax.random.categorical(row_key, row)

    kept = filter_logits(logits, sampling)
    return jax.vmap(draw)(kept, requests, positions).astype(jnp.int32)
