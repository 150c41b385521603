"""The gradients of q, a, b, k and g of one chunk and head, as pure functions of values.

Notation as in kernel_math.py; dR comes from the walk back. Summed over V, and masked as the scores:

    dA_qb = tril(dO Uᵀ)    dA_ab = stril(dR Uᵀ)    dA_qk = tril(dO Vᵀ)    dA_ak = stril(dR Vᵀ)
    dQ̂ = dO Sᵀ    dÂ = dR Sᵀ    dB_e = U dS'ᵀ    dK_e = V dS'ᵀ    dγ = rowsum_V(S ∘ dS')

Every score's decay is a product of two factors of one level, so the gradients of the scores go
through the level's scaled rows, as the scores did. Each row's factor is e^{a sum of log decays},
whose gradient is the row's value times its gradient; the mask that summed spreads it again. A log
decay's gradient is so a sum over all factors that cover it, and nothing is taken back from a sum.
"""

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NN, TN, matmul
from kernels_pallas.dplr.kernel_math import (
    Ends,
    Level,
    Pairs,
    Vectors,
    masked_sum,
    over_levels,
    pieces,
    scale_rows,
)
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up, indices


def mask_pairs(x: Pairs) -> Pairs:
    """Keeps the entries that the scores have."""
    i, j = indices(x.qb.shape[0])

    def keep(mask, y):
        return None if y is None else jnp.where(mask, y, 0.0)

    return Pairs(keep(i >= j, x.qb), keep(i > j, x.ab), keep(i >= j, x.qk), keep(i > j, x.ak))


def _spread(mask: jax.Array, x: jax.Array, operands: jnp.dtype) -> jax.Array:
    return masked_sum(mask, pieces(x, operands), TN)


def _sum_given(*terms: jax.Array | None) -> jax.Array:
    return add_up(x for x in terms if x is not None)


def end_gradients(
    x: Vectors, d: Vectors, dwhole: jax.Array, ends: Ends, operands: jnp.dtype, is_before: bool
) -> tuple[Vectors, jax.Array]:
    """Takes gradients through the decay between some columns of the rows and the chunk's ends.

    Args:
      x: the rows, with all factors but decay.
      d: gradients of Q̂, Â, B_e and K_e.
      dwhole: gradient of γ, [1, K_p].
      ends: the decay factors.
      operands: dtype of the products' operands.
      is_before: whether a reads the state before its row's own decay.

    Returns:
      The gradients of the rows, and that of g [C, K_p].
    """
    i, j = indices(x.q.shape[0])
    found = Vectors(
        ends.own * d.q,
        ends.before * d.a,
        ends.after * d.b,
        None if d.k is None else ends.after * d.k,
    )
    own, before = x.q * found.q, x.a * found.a
    after = _sum_given(x.b * found.b, None if found.k is None else x.k * found.k)
    dg = _spread(j > i, after, operands) + ends.whole * dwhole
    if is_before:
        dg = dg + _spread(j < i, before, operands)
    else:
        own = own + before
    return found, dg + _spread(j <= i, own, operands)


def pair_gradients(x: Vectors, d: Pairs, g: Parts, is_before: bool) -> tuple[Vectors, jax.Array]:
    """Takes gradients through some columns' share of the scores.

    Args:
      x: the rows, with all factors but decay.
      d: gradients of the scores, masked, float32.
      g: pieces of the log decays.
      is_before: whether a reads the state before its row's own decay.

    Returns:
      The gradients of the rows, and that of g [C, K_p].
    """
    size = x.q.shape[0]
    i, j = indices(size)
    operands = g[0].dtype
    has_k = x.k is not None

    def on_diagonal(y):
        return jnp.sum(jnp.where(i == j, y, 0.0), axis=1)[:, None]

    own_b = on_diagonal(d.qb)
    own_k = on_diagonal(d.qk) if has_k else None
    dq, da, db = own_b * x.b, jnp.zeros_like(x.a), own_b * x.q
    dk = own_k * x.q if has_k else None
    dq = dq + own_k * x.k if has_k else dq

    def add(level: Level, carry: tuple[Vectors, jax.Array]) -> tuple[Vectors, jax.Array]:
        total, dg = carry
        own = jnp.exp(masked_sum(level.own, g))
        before = jnp.exp(masked_sum(level.before, g)) if is_before else own
        y = scale_rows(x, own, before, operands)
        linked = Pairs(*(None if e is None else jnp.where(level.links, e, 0.0) for e in d))

        def reads(by_b, by_k):
            # In two pieces: where keys resemble each other large gradients cancel here.
            products = [matmul(piece, y.b, NN) for piece in pieces(by_b, operands)]
            return _sum_given(*products, matmul(by_k.astype(operands), y.k) if has_k else None)

        def writes(by_q, by_a):
            by_q, by_a = by_q.astype(operands), by_a.astype(operands)
            return matmul(by_q, y.q, TN) + matmul(by_a, y.a, TN)

        found = Vectors(
            own * reads(linked.qb, linked.qk),
            before * reads(linked.ab, linked.ak),
            own * writes(linked.qb, linked.ab),
            own * writes(linked.qk, linked.ak) if has_k else None,
        )
        span = _sum_given(x.q * found.q, x.b * found.b, x.k * found.k if has_k else None)
        if is_before:
            dg = dg + _spread(level.before, x.a * found.a, operands)
        else:
            span = span + x.a * found.a
        total = Vectors(*(None if t is None else t + f for t, f in zip(total, found, strict=True)))
        return total, dg + _spread(level.own, span, operands)

    return over_levels(size, add, (Vectors(dq, da, db, dk), jnp.zeros_like(x.q)))
