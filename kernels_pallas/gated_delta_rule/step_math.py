"""The decoding step's mathematics as the kernel does it: pure functions of values.

With raw rows q and k, factors m = scale / |q| and r = 1 / |k| (without l2-normalisation m = scale,
r = 1), γ = e^g, and both products taken of the state as it comes in:

    a = Sᵀk    b = Sᵀq    δ = β (v − γ r a)    S' = γ S + k (r δ)ᵀ    o = m (γ b + r (q·k) δ)

So nothing waits for the new state, nor the products for the norms.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.gated_delta_rule.inputs import L2_EPS


def step_values(
    tiles: Sequence[jax.Array],
    q: Sequence[jax.Array],
    k: Sequence[jax.Array],
    v: jax.Array,
    gamma: jax.Array | float,
    beta: jax.Array,
    query_factor: jax.Array | float,
    key_factor: jax.Array | float,
    overlap: jax.Array,
) -> tuple[list[jax.Array], jax.Array]:
    """The equations above for some columns of one head, on values.

    Args:
      tiles: the state's rows [K, V] in equal parts, float32.
      q: raw queries as columns [K, 1] in the same parts, float32.
      k: raw keys, likewise.
      v: value row [1, V], float32.
      gamma: decay.
      beta: writing strength; as all factors a scalar or [1, 1].
      query_factor: m.
      key_factor: r.
      overlap: q·k of the raw rows.

    Returns:
      The new state in the same parts, and o [1, V].
    """
    read_k, read_q = (
        jnp.sum(functools.reduce(jnp.add, map(jnp.multiply, tiles, x)), axis=0, keepdims=True)
        for x in (k, q)
    )
    error = v - gamma * key_factor * read_k
    # Selected, not only multiplied: an infinite value must not reach a row that writes nothing.
    delta = key_factor * jnp.where(beta == 0, 0.0, beta * error)
    o = query_factor * (gamma * read_q + overlap * delta)
    return [gamma * s + x * delta for s, x in zip(tiles, k, strict=True)], o


def row_values(
    q: Sequence[jax.Array], k: Sequence[jax.Array], *, scale: float, use_qk_l2norm: bool
) -> tuple[jax.Array | float, jax.Array | float, jax.Array]:
    """Computes what the step needs of one query and one key row.

    Args:
      q: raw query row in parts, each [part] or [1, part], float32.
      k: raw key row, likewise.
      scale: factor on the queries.
      use_qk_l2norm: whether rows are divided by their norm.

    Returns:
      m, r and q·k, scalars or [1, 1].
    """

    def dot(x, y):
        products = functools.reduce(jnp.add, map(jnp.multiply, x, y))
        return jnp.sum(products) if products.ndim == 1 else jnp.sum(products, axis=1, keepdims=True)

    if not use_qk_l2norm:
        return scale, 1.0, dot(q, k)
    query_factor, key_factor = (jax.lax.rsqrt(dot(x, x) + L2_EPS) for x in (q, k))
    return scale * query_factor, key_factor, dot(q, k)
