"""Gradients of a batch that is worked off in parts, to save memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from jet_jax import sharding

Batch = dict[str, Any]


def accumulate(
    grad: Callable[[PyTree, Batch], PyTree], params: PyTree, batch: Batch, count: int
) -> PyTree:
    """Sums what `grad` gives over equal parts of a batch, one part at a time.

    Args:
      grad: `(params, part) -> arrays`, such as a gradient and counts, to be summed over parts.
      params: its first argument.
      batch: arrays with B rows each.
      count: parts, a divisor of B; 1 takes the batch as it is.
    """
    if count == 1:
        return grad(params, batch)

    def split(x):
        # Row i goes to part i mod count, so that every part is spread over all batch shards.
        x = jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)
        spec = sharding.P(None, sharding.BATCH_AXES)
        mesh = jax.sharding.get_abstract_mesh()
        return x if mesh.empty else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def one(sums, part):
        return jax.tree.map(jnp.add, sums, grad(params, part)), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(grad, params, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(one, zeros, parts)[0]
