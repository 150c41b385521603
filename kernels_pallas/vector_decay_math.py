"""Decays of a key channel each, as kernels compute them: pure functions of one chunk's values.

A row t that reads (a query, a key of the delta rule) sees what an earlier row j has written with
every channel decayed by e^{sum of g over j < i <= t}. A row that reads after its own decay is
scaled by e^{g_t} beforehand, so that here all reads see the state before their row's decay, and

    score_tj = Σ_channels read_t write_j e^{Σ g_i, j < i < t}        j < t

The diagonal, where no decay is left, is the caller's. Levels, as in vector_decay.py: at level
l = 0, 1, ... rows lie in blocks of 2^l, and rows of every odd block read those of the even block
before it. One matrix of factors serves both sides of a pair, since rows of odd blocks only read and
those of even blocks only write:

    F = e^{M g}    M_ti = 1 where row i is in t's block and, t's block being odd: i < t
                                                            even: i > t
    score = Σ over levels of  [pair (t, j) meets here] ∘ (read F) (write F)ᵀ

All exponents are sums of numbers <= 0. In float32 all six levels of a chunk of 64 rows are worked
through. With bfloat16 operands, whose rounding is coarser than what an exponent loses, blocks whose
decays are bounded, as those of RWKV-7 (-0.61 a token) and mostly those of GLA and KDA are, take one
step instead: `base_bits` finds the largest blocks whose half decays by no more than e^-32, and in
those a pair is factored about the block's middle, with factors in e^±32. That is safe, for they are
bounded, and as exact: each term of a score is rounded relative to itself. Larger blocks than that
are reached by the levels above. A chunk with a segment's border (a decay of zero) takes all levels.

M g is a product with zeros and ones (and minus ones), x being split in two bfloat16. Columns of K
do not depend on each other but for the sum over them in the scores: a kernel takes a few at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NN, NT, loop, matmul
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up, indices
from kernels_pallas.gated_delta_rule.layout import span

BOUND = 32.0  # of the exponents about a block's middle: their products stay under e^64 = 6e27


def pieces(x: jax.Array, operands: jnp.dtype) -> Parts:
    """Cuts float32 values into operands that add up to them, to 2^-17 or better."""
    if operands == jnp.float32:
        return (x,)
    high = x.astype(operands)
    return high, (x - high.astype(jnp.float32)).astype(operands)


def masked_sum(mask: jax.Array, x: Parts, contract: Any = NN) -> jax.Array:
    """Sums those rows of x that the rows (with `TN` the columns) of a mask select.

    Args:
      mask: [C, C], boolean or of numbers that bfloat16 holds.
      x: pieces of [C, k].
      contract: `NN` or `TN`.

    Returns:
      [C, k] float32, to 1e-5 in bfloat16 and to float32 accuracy in float32.
    """
    mask = mask.astype(jnp.float32).astype(x[0].dtype)
    return add_up(matmul(mask, piece, contract) for piece in reversed(x))


def base_bits(most: jax.Array, size: int) -> jax.Array:
    """Returns how large the blocks are that are taken about their middle: 2^bits rows.

    Args:
      most: the largest -g of the chunk, a scalar.
      size: rows that the largest blocks may have.
    """
    fits = [(most * (1 << bits) <= BOUND).astype(jnp.int32) for bits in range(num_levels(size))]
    return add_up(fits)


def chunk_bits(g_ref: Any, rows: Any, part: int, size: int, operands: jnp.dtype) -> Any:
    """Returns `base_bits` of a chunk in a kernel; in float32 it is 0, one row a block.

    Args:
      g_ref: reference to log decays [T, K].
      rows: the chunk's.
      part: columns to take at a time.
      size: rows that the largest blocks may have.
      operands: dtype of the products' operands.
    """

    if operands == jnp.float32:
        return 0

    def most(p, x):
        return jnp.maximum(x, jnp.max(-g_ref[rows, span(p, part)], axis=0)[None, :])

    x = loop(g_ref.shape[-1] // part, most, jnp.zeros((1, part), jnp.float32))
    return base_bits(jnp.max(jnp.max(x, axis=1), axis=0), size)


def num_levels(size: int) -> int:
    """Returns the number of levels of a chunk of `size` rows, a power of two."""
    return size.bit_length() - 1


def level_masks(size: int, bits: Any) -> tuple[jax.Array, jax.Array]:
    """Returns M and the pairs that meet at the level whose blocks have 2^bits rows, [C, C]."""
    i, j = indices(size)
    block_i, block_j = i >> bits, j >> bits
    odd = (block_i & 1) == 1
    spans = (block_i == block_j) & ((odd & (j < i)) | (~odd & (j > i)))
    return spans, odd & (block_i == block_j + 1)


def base_masks(size: int, bits: Any) -> tuple[jax.Array, jax.Array]:
    """Returns M of blocks of 2^bits rows about their middle, float32, and the pairs in a block."""
    i, j = indices(size)
    same, half = (i >> bits) == (j >> bits), (1 << bits) >> 1
    row, column = i & ((1 << bits) - 1), j & ((1 << bits) - 1)
    later = same & (row >= half) & (column >= half) & (column < row)
    earlier = same & (row < half) & (column < half) & (column >= row)
    return later.astype(jnp.float32) - earlier.astype(jnp.float32), same & (j < i)


class Factors(NamedTuple):
    """One step of the pairs: what scales rows, [C, k] float32, and which pairs it serves."""

    reads: jax.Array
    writes: jax.Array
    links: jax.Array  # [C, C]
    spans: jax.Array  # M


def base_factors(g: jax.Array, bits: Any, operands: jnp.dtype) -> Factors:
    """Returns the factors of blocks about their middle."""
    spans, links = base_masks(g.shape[0], bits)
    exponent = masked_sum(spans, pieces(g, operands))
    # Only in blocks of one row, where no pair asks for it, can it exceed the bound.
    writes = jnp.exp(jnp.minimum(-exponent - g, BOUND))
    return Factors(jnp.exp(exponent), writes, links, spans)


def level_factors(g: jax.Array, bits: Any, operands: jnp.dtype) -> Factors:
    """Returns the factors of one level."""
    spans, links = level_masks(g.shape[0], bits)
    factor = jnp.exp(masked_sum(spans, pieces(g, operands)))
    return Factors(factor, factor, links, spans)


def over_pairs(size: int, bits: Any, base: Callable, level: Callable, carry: Any) -> Any:
    """Goes through blocks about their middle, then through the levels above them.

    Args:
      size: C.
      bits: of the blocks; a Python 0 leaves them out.
      base: from the carry to the carry.
      level: from a level's bits and the carry to the carry.
      carry: the first.
    """
    if not (isinstance(bits, int) and bits == 0):
        carry = base(carry)
    return jax.lax.fori_loop(bits, num_levels(size), level, carry)


Rows = tuple[jax.Array, ...]  # [C, k] float32 each
Scores = tuple[
    tuple[jax.Array, ...], ...
]  # of each kind of reads by each of writes, [C, C] float32


def add_scores(
    sums: Scores, reads: Rows, writes: Rows, g: jax.Array, bits: Any, operands: jnp.dtype
) -> Scores:
    """Adds some columns' share of the scores below the diagonal.

    Args:
      sums: scores so far.
      reads: rows that read, times e^g where they read after their own decay.
      writes: rows that write.
      g: log decays likewise.
      bits: see `base_bits`.
      operands: dtype of the products' operands.

    Returns:
      The sums.
    """

    def add(factors: Factors, sums: Scores) -> Scores:
        left = [(x * factors.reads).astype(operands) for x in reads]
        right = [(x * factors.writes).astype(operands) for x in writes]
        return tuple(
            tuple(
                total + jnp.where(factors.links, matmul(x, y, NT), 0.0)
                for total, y in zip(totals, right, strict=True)
            )
            for totals, x in zip(sums, left, strict=True)
        )

    return over_pairs(
        g.shape[0],
        bits,
        lambda sums: add(base_factors(g, bits, operands), sums),
        lambda bits, sums: add(level_factors(g, bits, operands), sums),
        sums,
    )


class Ends(NamedTuple):
    """Factors between rows and the chunk's ends."""

    before: jax.Array  # e^{sum of g before the row}, of reads of the state before the chunk [C, k]
    after: jax.Array  # e^{sum of g after the row}, of writes as the chunk's end sees them [C, k]
    whole: jax.Array  # e^{sum of all g} [1, k]


def end_factors(g: jax.Array, operands: jnp.dtype) -> Ends:
    """Computes the factors of log decays [C, k] float32."""
    i, j = indices(g.shape[0])
    x = pieces(g, operands)
    return Ends(
        jnp.exp(masked_sum(j < i, x)),
        jnp.exp(masked_sum(j > i, x)),
        jnp.exp(jnp.sum(g, axis=0)[None, :]),
    )
