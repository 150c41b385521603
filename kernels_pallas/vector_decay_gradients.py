"""Gradients through decays of a key channel each, as kernels compute them (vector_decay_math.py).

A log decay's gradient is a sum over all factors that span its row. About the middle of a block
those of reads and writes have opposite signs and cancel for pairs on one side; they are products of
the same rounded rows and the same rounded gradients of scores, and so cancel to float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import TN, matmul
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up, indices
from kernels_pallas.vector_decay_math import (
    Factors,
    Rows,
    base_factors,
    end_factors,
    level_factors,
    masked_sum,
    over_pairs,
    pieces,
)


class Gradients(NamedTuple):
    """Gradients of some columns of a chunk's rows, [C, k] float32."""

    reads: Rows
    writes: Rows
    g: jax.Array


def add_gradients(
    sums: Gradients,
    rows: Callable[[], tuple[Rows, Rows, jax.Array]],
    dscores: Callable[[], tuple[tuple[Parts, ...], ...]],
    bits: Any,
    operands: jnp.dtype,
) -> Gradients:
    """Adds the gradients through some columns' share of the scores below the diagonal.

    Args:
      sums: gradients so far.
      rows: gives reads, writes and g as for `add_scores`; called at every step, so that a kernel
        need not hold them.
      dscores: gives pieces of the scores' gradients, likewise; only those below the diagonal count.
      bits: see `base_bits`.
      operands: dtype of the products' operands.

    Returns:
      The sums.
    """

    def add(factors: Factors, reads, writes, sums: Gradients):
        left = [(x * factors.reads).astype(operands) for x in reads]
        right = [(x * factors.writes).astype(operands) for x in writes]
        linked = jax.tree.map(lambda x: jnp.where(factors.links, x, jnp.zeros_like(x)), dscores())
        dleft, dright = _by_writes(linked, right), _by_reads(linked, left)
        found = Gradients(
            tuple(x + factors.reads * d for x, d in zip(sums.reads, dleft, strict=True)),
            tuple(x + factors.writes * d for x, d in zip(sums.writes, dright, strict=True)),
            sums.g,
        )

        def inner(rows, gradients):
            pairs = zip(rows, gradients, strict=True)
            return add_up(x.astype(jnp.float32) * d for x, d in pairs)

        return found, inner(left, dleft), inner(right, dright)

    def spread(factors: Factors, x: jax.Array) -> jax.Array:
        return masked_sum(factors.spans, pieces(x, operands), TN)

    def base(sums: Gradients) -> Gradients:
        reads, writes, g = rows()
        factors = base_factors(g, bits, operands)
        found, by_reads, by_writes = add(factors, reads, writes, sums)
        return found._replace(g=found.g + spread(factors, by_reads - by_writes) - by_writes)

    def level(bits, sums: Gradients) -> Gradients:
        reads, writes, g = rows()
        factors = level_factors(g, bits, operands)
        found, by_reads, by_writes = add(factors, reads, writes, sums)
        return found._replace(g=found.g + spread(factors, by_reads + by_writes))

    return over_pairs(sums.g.shape[0], bits, base, level, sums)


class Tile(NamedTuple):
    """The gradients of half a chunk's rows, or of all (half_chunks.py)."""

    own: Gradients
    beyond: Any  # what each row's g in the other half gets besides, [1, k]; None without halves


def tile_gradients(
    rows: Callable[[], tuple[Rows, Rows, jax.Array]],
    other: Callable[[], tuple[Rows, Rows, jax.Array]] | None,
    dscores: Callable[[bool, bool], tuple[tuple[Parts, ...], ...]],
    d: Gradients,
    dwhole: jax.Array,
    is_second: Any,
    bits: Any,
    operands: jnp.dtype,
) -> Tile:
    """Takes gradients through the decays of some columns of a chunk.

    Args:
      rows: gives reads, writes and g as for `add_scores`, of this half of the rows; called often,
        so that a kernel need not hold them.
      other: gives those of the other half; None where the first are all.
      dscores: gives pieces of the gradients of the scores where rows of the other half (else of
        this one) read what rows of the other half (else of this one) have written.
      d: gradients of the reads times the decay since the chunk's start, and of the writes times
        that to its end; its g is not used.
      dwhole: gradient of e^{sum of all g}, [1, k].
      is_second: whether this half is the second, a scalar.
      bits: see `base_bits`.
      operands: dtype of the products' operands.
    """
    reads, writes, g = rows()
    i, j = indices(g.shape[0])
    ends = end_factors(g, operands)
    start, end, whole = ends

    def inner(x: Rows, y: Rows) -> jax.Array:
        return add_up(a * b for a, b in zip(x, y, strict=True))

    if other is not None:
        rest = jnp.exp(jnp.sum(other()[2], axis=0)[None, :])
        start, end = start * jnp.where(is_second, rest, 1.0), end * jnp.where(is_second, 1.0, rest)
        whole = whole * rest
    dreads, dwrites = tuple(start * x for x in d.reads), tuple(end * x for x in d.writes)
    by_reads, by_writes, beyond = inner(reads, dreads), inner(writes, dwrites), None
    if other is not None:
        beyond = jnp.sum(jnp.where(is_second, by_reads, by_writes), axis=0)[None, :]

        def reads_of_other():
            _, other_writes, other_g = other()
            factor = jnp.exp(masked_sum(j > i, pieces(other_g, operands)))
            right = [(x * factor).astype(operands) for x in other_writes]
            linked = tuple(ends.before * x for x in _by_writes(dscores(False, True), right))
            return _add(dreads, linked), dwrites, by_reads + inner(reads, linked), by_writes

        def writes_to_other():
            other_reads, _, other_g = other()
            factor = jnp.exp(masked_sum(j < i, pieces(other_g, operands)))
            left = [(x * factor).astype(operands) for x in other_reads]
            linked = tuple(ends.after * x for x in _by_reads(dscores(True, False), left))
            return dreads, _add(dwrites, linked), by_reads, by_writes + inner(writes, linked)

        dreads, dwrites, by_reads, by_writes = jax.lax.cond(
            is_second, reads_of_other, writes_to_other
        )
    dg = masked_sum(j < i, pieces(by_reads, operands), TN) + whole * dwhole
    dg = dg + masked_sum(j > i, pieces(by_writes, operands), TN)
    sums = Gradients(dreads, dwrites, dg)
    return Tile(add_gradients(sums, rows, lambda: dscores(False, False), bits, operands), beyond)


def _add(x: Rows, y: Rows) -> Rows:
    return tuple(a + b for a, b in zip(x, y, strict=True))


def _by_writes(dscores: Any, writes: Any) -> Rows:
    """Returns the gradients of scaled reads."""
    return tuple(
        add_up(matmul(x, y) for parts, y in zip(kinds, writes, strict=True) for x in parts)
        for kinds in dscores
    )


def _by_reads(dscores: Any, reads: Any) -> Rows:
    """Returns the gradients of scaled writes."""
    return tuple(
        add_up(matmul(x, y, TN) for parts, y in zip(kinds, reads, strict=True) for x in parts)
        for kinds in zip(*dscores, strict=True)
    )
