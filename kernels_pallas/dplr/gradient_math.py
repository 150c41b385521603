"""The gradients of q, a, b, k and g of one chunk and head, as pure functions of values.

Notation as in kernel_math.py; dR comes from the walk back. Summed over V, and masked as the scores:

    dA_qb = tril(dO Uᵀ)    dA_ab = stril(dR Uᵀ)    dA_qk = tril(dO Vᵀ)    dA_ak = stril(dR Vᵀ)
    dQ̂ = dO Sᵀ    dÂ = dR Sᵀ    dB_e = U dS'ᵀ    dK_e = V dS'ᵀ    dγ = rowsum_V(S ∘ dS')

These go through the decays as vector_decay_gradients.py says. A row that reads after its own decay
e^g leads to g by that factor too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.dplr.kernel_math import Vectors, scale_reads
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up
from kernels_pallas.vector_decay_gradients import Gradients, tile_gradients


class RowGradients(NamedTuple):
    """The gradients of some rows and columns."""

    rows: Vectors
    g: jax.Array
    beyond: Any  # see `vector_decay_gradients.Tile`


def row_gradients(
    rows: Callable[[], tuple[Vectors, jax.Array]],
    other: Callable[[], tuple[Vectors, jax.Array]] | None,
    below: Callable[[bool, bool], tuple[tuple[Parts, ...], ...]],
    own_pairs: tuple[jax.Array, ...],
    d: Vectors,
    dwhole: jax.Array,
    is_second: Any,
    bits: Any,
    operands: jnp.dtype,
    is_before: bool,
) -> RowGradients:
    """Takes gradients through some columns' share of the scores and of what meets the state.

    Args:
      rows: gives the rows, with all factors but decay, and the log decays, of all of the chunk or
        half of it; called often, so that a kernel need not hold them.
      other: gives those of the other half, or None.
      below: gives blocks of the scores' gradients (see
        `vector_decay_gradients.tile_gradients`).
      own_pairs: the diagonals of those of q as columns.
      d: gradients of Q̂, Â, B_e and K_e.
      dwhole: gradient of γ, [1, K_p].
      is_second: whether the rows are the second half.
      bits: see `vector_decay_math.base_bits`.
      operands: dtype of the products' operands.
      is_before: whether a reads the state before its row's own decay.
    """

    def scaled(rows):
        def give():
            x, g = rows()
            x = scale_reads(x, jnp.exp(g), is_before)
            return x.reads, x.writes, g

        return give

    sums = Gradients(d.reads, d.writes, rows()[1])
    sums, beyond = tile_gradients(
        scaled(rows),
        None if other is None else scaled(other),
        below,
        sums,
        dwhole,
        is_second,
        bits,
        operands,
    )
    x, g = rows()
    own, dg = jnp.exp(g), sums.g
    dq, da = sums.reads
    dq = own * dq
    dg = dg + x.q * dq
    if not is_before:
        da = own * da
        dg = dg + x.a * da
    dq = dq + add_up(y * w for y, w in zip(own_pairs, x.writes, strict=True))
    db, *dk = (dw + y * x.q for dw, y in zip(sums.writes, own_pairs, strict=True))
    return RowGradients(Vectors(dq, da, db, dk[0] if dk else None), dg, beyond)
