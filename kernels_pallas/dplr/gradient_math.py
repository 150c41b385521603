"""The gradients of q, a, b, k and g of one chunk and head, as pure functions of values.

Notation as in kernel_math.py; dR comes from the walk back. Summed over V, and masked as the scores:

    dA_qb = tril(dO Uᵀ)    dA_ab = stril(dR Uᵀ)    dA_qk = tril(dO Vᵀ)    dA_ak = stril(dR Vᵀ)
    dQ̂ = dO Sᵀ    dÂ = dR Sᵀ    dB_e = U dS'ᵀ    dK_e = V dS'ᵀ    dγ = rowsum_V(S ∘ dS')

These go through the decays as vector_decay_math.py says. A row that reads after its own decay e^g
leads to g by that factor too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dplr.kernel_math import Pairs, Vectors, scale_reads
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up, indices
from kernels_pallas.vector_decay_math import (
    Gradients,
    add_gradients,
    end_factors,
    end_gradients,
    pieces,
)


class PairGradients(NamedTuple):
    """The gradients of the scores as the columns of K meet them."""

    below: tuple[tuple[Parts, ...], ...]  # pieces, by reads and writes
    own: tuple[jax.Array, ...]  # the diagonal of those of q, by writes [C, 1] float32


def cut_pairs(x: Pairs, operands: jnp.dtype) -> PairGradients:
    """Takes the gradients of the scores apart.

    Those by b are kept in two pieces: where keys resemble each other large ones cancel.
    """
    i, j = indices(x.qb.shape[0])
    of_q, of_a = x.nested

    def cut(by_b, *by_k):
        return pieces(by_b, operands), *((y.astype(operands),) for y in by_k)

    own = tuple(jnp.sum(jnp.where(i == j, y, 0.0), axis=1)[:, None] for y in of_q)
    return PairGradients((cut(*of_q), cut(*of_a)), own)


def row_gradients(
    rows: Callable[[], tuple[Vectors, jax.Array]],
    pairs: PairGradients,
    d: Vectors,
    dwhole: jax.Array,
    bits: Any,
    operands: jnp.dtype,
    is_before: bool,
) -> tuple[Vectors, jax.Array]:
    """Takes gradients through some columns' share of the scores and of what meets the state.

    Args:
      rows: gives the rows, with all factors but decay, and the log decays; called often, so that a
        kernel need not hold them.
      pairs: gradients of the scores.
      d: gradients of Q̂, Â, B_e and K_e.
      dwhole: gradient of γ, [1, K_p].
      bits: see `vector_decay_math.base_bits`.
      operands: dtype of the products' operands.
      is_before: whether a reads the state before its row's own decay.

    Returns:
      The gradients of the rows, and that of g [C, K_p].
    """

    def scaled():
        x, g = rows()
        x = scale_reads(x, jnp.exp(g), is_before)
        return x.reads, x.writes, g

    reads, writes, g = scaled()
    sums = Gradients(d.reads, d.writes, g)
    sums = end_gradients(reads, writes, sums, dwhole, end_factors(g, operands), operands)
    sums = add_gradients(sums, scaled, pairs.below, bits, operands)
    x, g = rows()
    own, dg = jnp.exp(g), sums.g
    dq, da = sums.reads
    dq = own * dq
    dg = dg + x.q * dq
    if not is_before:
        da = own * da
        dg = dg + x.a * da
    dq = dq + add_up(y * w for y, w in zip(pairs.own, x.writes, strict=True))
    db, *dk = (dw + y * x.q for dw, y in zip(sums.writes, pairs.own, strict=True))
    return Vectors(dq, da, db, dk[0] if dk else None), dg
