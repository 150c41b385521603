"""The gradients of q, k, g and β of one chunk and head, as pure functions of values.

Notation as in kernel_math.py; dV comes from the walk back. All gradients follow from five products
of a chunk, summed over V. Two are between rows:

    X = dO Nᵀ    Z = stril(dV Nᵀ)    z = diag(dV Nᵀ)

    G = m (X ∘ D) β r           the gradient of QKᵀ, C x C
    J = r (Z ∘ D) β r           minus the gradient of KKᵀ
    dβ = z / β                  since dV is β times the gradient of δ, whose factor N is
       = colsum(X ∘ P) − colsum(Z ∘ L) + d        where β is 0; P = tril(QKᵀ ∘ D), d below

and three are with the states. In terms of the rows as given, before their normalisation:

    a = h (dO Sᵀ)    b = f (dV Sᵀ)    c = ε r (N dS'ᵀ)    d = rowsum(K ∘ c)
    dQ = a + G K     dK = β c − b + Gᵀ Q − (J + Jᵀ) K

and a normalised row takes away what lies along itself: dq −= (m²/scale²) (q·dq) q.

A log decay scales every factor whose span covers its row, so its gradient sums the gradients of
all such factors' logarithms: P ∘ X β − L ∘ Z β of D_ij for j < t <= i; q·a − k·b of γ_i for
t <= i; β d of ε_j for j < t; and γ_C <S, dS'>. The sum over pairs is taken from their row and
column sums, without the diagonal, which would cancel (gates.py: `decay_gradient`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NN, NT, TN, matmul
from kernels_pallas.gated_delta_rule.kernel_math import (
    Gates,
    Parts,
    add_up,
    between,
    indices,
    normalisers,
    to_column,
    to_row,
)


class PairProducts(NamedTuple):
    """Products between rows, summed over V, [C, C] float32."""

    do_news: jax.Array  # X
    dv_news: jax.Array  # Z, not masked yet


class PairGradients(NamedTuple):
    """What follows from the products between rows."""

    by_scores: jax.Array  # G [C, C], in the operands' dtype
    by_gram: jax.Array  # J + Jᵀ [C, C], in the operands' dtype
    beta: jax.Array  # of β where it is 0, [1, C], without d
    own: jax.Array  # z, [1, C]
    decay: jax.Array  # row sums less column sums of the pairs, [1, C]


def pair_gradients(
    x: PairProducts, q: Parts, k: Parts, gates: Gates, scale: float, use_qk_l2norm: bool
) -> PairGradients:
    """Computes one chunk's gradients with respect to the products between rows.

    Args:
      x: the chunk's products.
      q: query rows, parts [C, k_p].
      k: key rows, parts [C, k_p].
      gates: the chunk's gates.
      scale: factor on the queries.
      use_qk_l2norm: whether rows are normalised.

    Returns:
      The chunk's `PairGradients`.
    """
    dtype = k[0].dtype
    m, r = normalisers(q, k, scale, use_qk_l2norm)
    decay = between(gates.coarse, gates.fine)
    i, j = indices(decay.shape[0])
    decay_r = decay * to_row(r)
    gram = add_up(matmul(a, a, NT) for a in k)
    pairs = jnp.where(i > j, x.dv_news, 0.0) * (decay_r * r)
    by_gram, products = pairs * gates.beta, -pairs * gram
    pairs = x.do_news * (decay_r * m)
    by_scores = pairs * gates.beta
    products = products + pairs * add_up(matmul(a, b, NT) for a, b in zip(q, k, strict=True))
    dbeta = jnp.sum(products, axis=0)[None, :]
    products = jnp.where(i > j, products * gates.beta, 0.0)
    rows = jnp.sum(products, axis=1)[:, None]
    return PairGradients(
        by_scores.astype(dtype),
        (by_gram + by_gram.T).astype(dtype),
        dbeta,
        jnp.sum(jnp.where(i == j, x.dv_news, 0.0), axis=0)[None, :],
        to_row(rows) - jnp.sum(products, axis=0)[None, :],
    )


class StateProducts(NamedTuple):
    """Products with the states, summed over V, float32."""

    do_state: Parts  # dO Sᵀ, parts [C, k_p]
    dv_state: Parts  # dV Sᵀ, parts [C, k_p]
    news_dstate: Parts  # N dS'ᵀ, parts [C, k_p]


def add_state_products(
    sums: StateProducts, state: Parts, dstate: Parts, do: jax.Array, dv: jax.Array, news: jax.Array
) -> StateProducts:
    """Adds the share of some columns of V.

    Args:
      sums: the sums so far.
      state: Sᵀ before the chunk, parts [v, k_p], in the operands' dtype.
      dstate: the gradient of Sᵀ after the chunk, likewise.
      do: dO [C, v], likewise.
      dv: dV [C, v], likewise.
      news: N [C, v], likewise.
    """

    def add(total, rows, parts):
        return tuple(x + matmul(rows, y, NN) for x, y in zip(total, parts, strict=True))

    return StateProducts(
        add(sums.do_state, do, state),
        add(sums.dv_state, dv, state),
        add(sums.news_dstate, news, dstate),
    )


class RowGradients(NamedTuple):
    """Gradients of a chunk's query and key rows, float32."""

    q: Parts
    k: Parts
    from_start: jax.Array  # gradient of log γ, [1, C]
    to_write: jax.Array  # d, [1, C]


def _dot_rows(x: Parts, y: Parts) -> jax.Array:
    products = (jnp.sum(a.astype(jnp.float32) * b, axis=1) for a, b in zip(x, y, strict=True))
    return add_up(products)[:, None]


def row_gradients(
    sums: StateProducts,
    pair: PairGradients,
    q: Parts,
    k: Parts,
    gates: Gates,
    scale: float,
    use_qk_l2norm: bool,
) -> RowGradients:
    """Computes the gradients of one chunk's rows.

    Args:
      sums: the chunk's products with the states.
      pair: what the products between rows gave.
      q: query rows, parts [C, k_p].
      k: key rows, parts [C, k_p].
      gates: the chunk's gates.
      scale: factor on the queries.
      use_qk_l2norm: whether rows are normalised.

    Returns:
      The chunk's `RowGradients`.
    """
    m, r = normalisers(q, k, scale, use_qk_l2norm)
    gamma, beta = to_column(gates.from_start), to_column(gates.beta)
    h, f, w = gamma * m, gamma * r, to_column(gates.to_end) * r
    from_q = tuple(x * h for x in sums.do_state)
    from_k = tuple(x * f for x in sums.dv_state)
    written = tuple(x * w for x in sums.news_dstate)
    to_write = _dot_rows(k, written)
    from_start = _dot_rows(q, from_q) - _dot_rows(k, from_k)
    dq = tuple(x + matmul(pair.by_scores, y, NN) for x, y in zip(from_q, k, strict=True))
    dk = tuple(
        beta * x - y + (matmul(pair.by_scores, a, TN) - matmul(pair.by_gram, b, NN))
        for x, y, a, b in zip(written, from_k, q, k, strict=True)
    )
    if use_qk_l2norm:
        along_q = (m / scale) * (m / scale) * _dot_rows(q, dq)
        along_k = r * r * _dot_rows(k, dk)
        dq = tuple(x - along_q * y.astype(jnp.float32) for x, y in zip(dq, q, strict=True))
        dk = tuple(x - along_k * y.astype(jnp.float32) for x, y in zip(dk, k, strict=True))
    return RowGradients(dq, dk, to_row(from_start), to_row(to_write))
