"""The gated delta rule a chunk at a time: pure functions on values, batched over leading axes.

With G the running sum of g inside a chunk, C its last row and S the state before it:

    γ_i = e^{G_i}            from the chunk's start to row i, row i's decay included
    D_ij = e^{G_i − G_j}     between rows, i >= j
    ε_j = e^{G_C − G_j}      from row j to the chunk's end
    A = stril(β (KKᵀ ∘ D))   T = (I + A)^-1        P = tril(QKᵀ ∘ D)
    R = β (V − γ (K S))      U = T R               (U: the rows δ of the recurrence)
    O = γ (Q S) + P U        S' = γ_C S + Kᵀ (ε U)

A segment border is a decay of zero: D_ij = 0 between rows of different segments, γ_i = 0 unless
row i belongs to the segment that S belongs to, ε_j = 0 unless row j belongs to the chunk's last
segment. Nothing else changes, so borders may lie anywhere. No e^{+G} appears: factoring D into
e^{G_i} e^{−G_j} overflows under strong decay.

The backward pass, with dO and the gradient dS' of the state after the chunk:

    dU = Pᵀ dO + ε (K dS')   dR = Tᵀ dU
    dS = γ_C dS' + Qᵀ (γ dO) − Kᵀ (β γ dR)
    dP = tril(dO Uᵀ)         dA = −stril(dR Uᵀ)    M = β (dA ∘ D)
    dQ = γ (dO Sᵀ) + (dP ∘ D) K
    dK = −βγ (dR Sᵀ) + M K + (dP ∘ D)ᵀ Q + Mᵀ K + ε (U dS'ᵀ)
    dV = β dR                dβ = rowsum(dR ∘ (V − γ (K S))) + rowsum(dA ∘ KKᵀ ∘ D)

g_l scales each decay factor whose span covers l, so its gradient sums, over all such factors, the
gradient of the factor's logarithm: see `decay_gradient`. (Differences of row and column sums give
the same number, but cancel under strong decay.)
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Decay(NamedTuple):
    """Decay factors of each chunk; notation as in the module's docstring."""

    between: Float[Array, "*N C C"]  # D, zero above the diagonal
    from_start: Float[Array, "*N C"]  # γ
    to_end: Float[Array, "*N C"]  # ε
    whole: Float[Array, "*N"]  # γ_C


def dot(spec: str, a: jax.Array, b: jax.Array, operands: jnp.dtype) -> jax.Array:
    """Multiplies with operands rounded to `operands`, and sums in float32 (float64 for float64).

    Operands wider than 16 bits are multiplied in full: a GPU would otherwise use TF32.
    """
    sums = jnp.promote_types(operands, jnp.float32)
    precision = None if jnp.finfo(operands).bits == 16 else jax.lax.Precision.HIGHEST
    return jnp.einsum(
        spec,
        a.astype(operands),
        b.astype(operands),
        precision=precision,
        preferred_element_type=sums,
    )


def decay_factors(
    g: Float[Array, "*N C"], segments: Int[Array, "... C"] | None, before: Int[Array, "..."] | None
) -> Decay:
    """Computes a chunk's decay factors.

    Args:
      g: log decays.
      segments: number of the segment of each row, rising, of a shape that broadcasts against g;
        None is one segment.
      before: number of the segment that the state before the chunk belongs to.

    Returns:
      The factors, zero across segment borders.
    """
    size = g.shape[-1]
    # G_i − G_j loses the small decays behind a large one if G is rounded. So g is split into a
    # part on a grid so coarse that sums of it are exact, and a rest too small to lose anything.
    # e^lowest is 0, so the cut at `lowest`, which bounds the sums, changes nothing.
    info = jnp.finfo(g.dtype)
    lowest = -120.0 if info.bits == 32 else -800.0
    grid = 2.0 ** math.floor(info.nmant + 1 - math.log2(size * -lowest))
    g = jnp.maximum(g, lowest)
    coarse = jnp.round(g * grid) / grid
    mask = jnp.tri(size, dtype=bool)
    parts = [dot("ij,...j->...i", mask, part, g.dtype) for part in (coarse, g - coarse)]
    between = sum(part[..., :, None] - part[..., None, :] for part in parts)
    from_start = parts[0] + parts[1]
    to_end = sum(part[..., -1:] - part for part in parts)
    if segments is not None and before is not None:
        mask = mask & (segments[..., :, None] == segments[..., None, :])
        from_start = jnp.where(segments == before[..., None], from_start, -jnp.inf)
        to_end = jnp.where(segments == segments[..., -1:], to_end, -jnp.inf)
    from_start = jnp.exp(from_start)
    return Decay(
        jnp.exp(jnp.where(mask, between, -jnp.inf)),
        from_start,
        jnp.exp(to_end),
        from_start[..., -1],
    )


def strictly_lower(x: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """Keeps the entries below the diagonal."""
    return jnp.tril(x, -1)


def _diagonal_blocks(x: Float[Array, "*N M C M C"]) -> Float[Array, "*N M C C"]:
    """Takes the blocks (i, i). As a masked sum, which XLA compiles faster than slices."""
    is_diagonal = jnp.eye(x.shape[-2], dtype=bool)[:, None, :, None]
    return jnp.sum(jnp.where(is_diagonal, x, 0), axis=-2)


def unit_lower_inverse(a: Float[Array, "*N C C"], start: int = 16) -> Float[Array, "*N C C"]:
    """Inverts I + a, a strictly lower triangular.

    Diagonal blocks of `start` rows by substitution, row after row for all blocks at once; then
    pairs of blocks are joined, [[X, 0], [B, Y]]^-1 = [[X^-1, 0], [-Y^-1 B X^-1, Y^-1]], doubling
    the size until one is left. Every intermediate is the exact inverse of a part of I + a. Powers
    of a (Neumann series, repeated squaring) take fewer steps and fail for keys that point the
    same way, as SiLU makes them: they grow to 1e20 before they cancel. LAPACK's solver is not
    used since its threads spin between the small calls and starve the rest of the program.

    Args:
      a: strictly lower triangular; C is a power of two and a multiple of `start`.
      start: rows of the first blocks.

    Returns:
      The inverse.
    """
    lead, size = a.shape[:-2], a.shape[-1]
    count = size // start
    blocks = _diagonal_blocks(a.reshape(*lead, count, start, count, start))
    eye = jnp.eye(start, dtype=a.dtype)

    def solve_row(row, x):  # row `row` of a is zero from column `row` on
        coefficients = jax.lax.dynamic_index_in_dim(blocks, row, axis=-2, keepdims=False)
        solved = eye[row] - jnp.sum(coefficients[..., :, None] * x, axis=-2)
        return jax.lax.dynamic_update_index_in_dim(x, solved, row, axis=-2)

    x = jax.lax.fori_loop(1, start, solve_row, jnp.broadcast_to(eye, blocks.shape))
    while count > 1:
        size_now, count = size // count, count // 2
        below = a.reshape(*lead, count, 2, size_now, count, 2, size_now)[..., 1, :, :, 0, :]
        below = _diagonal_blocks(below)
        x = x.reshape(*lead, count, 2, size_now, size_now)
        upper, lower = x[..., 0, :, :], x[..., 1, :, :]
        joined = dot("...ij,...jk->...ik", lower, below, a.dtype)
        joined = -dot("...ij,...jk->...ik", joined, upper, a.dtype)
        x = jnp.block([[upper, jnp.zeros_like(upper)], [joined, lower]])
    return x[..., 0, :, :]


def decay_gradient(
    pairs: Float[Array, "*N C C"],
    from_start: Float[Array, "*N C"],
    to_end: Float[Array, "*N C"],
    whole: Float[Array, "*N"],
) -> Float[Array, "*N C"]:
    """Sums the gradients of the log decay factors whose span covers each row.

    Args:
      pairs: gradient of log D_ij, whose span is j < l <= i.
      from_start: gradient of log γ_i, span l <= i.
      to_end: gradient of log ε_j, span j < l.
      whole: gradient of log γ_C as it scales the state, span all.

    Returns:
      The gradient of g.
    """
    # One product with a triangle of ones for all sums, and no sum that is taken back from
    # another: sums over j < l as sums over j <= l less row l would cancel (ε_C is 1).
    from_row = jnp.tri(pairs.shape[-1], dtype=pairs.dtype).T  # [l, i], i >= l
    spans = dot("li,...ij->...lj", from_row, pairs, pairs.dtype)
    spans += to_end[..., None, :]
    after = dot("li,...i->...l", from_row, from_start, pairs.dtype)
    return jnp.sum(strictly_lower(spans), axis=-1) + after + whole[..., None]
