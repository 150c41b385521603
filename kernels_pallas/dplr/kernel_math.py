"""The chunk's mathematics as the kernels of KDA and the DPLR rule do it: functions of values.

Notation as in xla.py, for one chunk of C rows and one head; A_qk, A_qb, A_ak, A_ab are the scores
of pairs, T = (I − A_ab)^-1. What needs no state is worked out beforehand (`prepare`):

    F = A_qb T        W = T Â        M = Q̂ + F Â        Z = T A_ak        Y = A_qk + F A_ak

so that two products are the only chain of the walk over the chunks, and of the walk back:

    U = W S + Z V          O = M S + Y V              S' = γ S + B_eᵀ U + K_eᵀ V
    D = B_e dS'            dS = γ dS' + Wᵀ D + Mᵀ dO
    dV = Zᵀ D + Yᵀ dO + K_e dS'                       dR = Tᵀ D + Fᵀ dO

KDA is the case a = −k, b = β k with Â read after the row's own decay, V in the place of A_ak V, and
nothing written but along b: Z = T, Y = F, dV = dR, and U are the errors v − S~ᵀk.

Decay between rows: at level s = 1, 2, 4, ... rows lie in blocks of s. With masks of 0 and 1, one
product sums the log decays of each row of an odd block from the block's start, and of each row of
an even block to the block's end; e^{these sums} scales rows that read and rows that write, and of
their product the entries count that link an odd block to the even one before. Every pair is
linked at one level, all exponents are sums of numbers <= 0, and nothing is subtracted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NN, NT, matmul
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up, indices, unit_inverse


class Vectors(NamedTuple):
    """Some columns of a chunk's rows, or what belongs to them, [C, K_p] float32."""

    q: Any
    a: Any
    b: Any
    k: Any  # None in KDA


class Level(NamedTuple):
    """Masks [C, C] of one level."""

    own: jax.Array  # sums a row's log decays with the row's own where it reads
    before: jax.Array  # the same without the row's own
    links: jax.Array  # pairs of rows that meet at this level


def level_masks(size: int, bits: Any) -> Level:
    """Returns the masks of the level whose blocks have 2^bits rows, of a chunk of `size` rows."""
    i, j = indices(size)
    block_i, block_j = i >> bits, j >> bits
    inside, odd = block_i == block_j, (block_i & 1) == 1
    return Level(
        inside & ((odd & (j <= i)) | (~odd & (j > i))),
        inside & odd & (j < i),
        odd & (block_i == block_j + 1),
    )


def over_levels(size: int, body: Callable[[Level, Any], Any], carry: Any) -> Any:
    """Loops over the levels of a chunk; unrolled, their masks would fill a GPU's shared memory."""

    def level(bits, carry):
        return body(level_masks(size, bits), carry)

    return jax.lax.fori_loop(0, size.bit_length() - 1, level, carry)


def pieces(x: jax.Array, operands: jnp.dtype) -> Parts:
    """Cuts float32 values into operands that add up to them, to 2^-17 or better."""
    if operands == jnp.float32:
        return (x,)
    high = x.astype(operands)
    return high, (x - high.astype(jnp.float32)).astype(operands)


def masked_sum(mask: jax.Array, x: Parts, contract: Any = NN) -> jax.Array:
    """Sums those rows of x that the rows (with `TN` the columns) of a mask select."""
    mask = jnp.where(mask, 1.0, 0.0).astype(x[0].dtype)
    return add_up(matmul(mask, piece, contract) for piece in reversed(x))


def multiply(x: jax.Array, y: jax.Array, operands: jnp.dtype) -> jax.Array:
    """Multiplies float32 matrices to 2^-16 or better, whatever the operands' dtype."""
    x_pieces, y_pieces = pieces(x, operands), pieces(y, operands)
    products = [
        matmul(a, b)
        for n, a in enumerate(x_pieces)
        for m, b in enumerate(y_pieces)
        if n + m < len(x_pieces)
    ]
    return add_up(reversed(products))


class Pairs(NamedTuple):
    """Scores of pairs of rows [C, C], or their gradients; the last two are None in KDA."""

    qb: Any
    ab: Any
    qk: Any
    ak: Any


def scale_rows(x: Vectors, own: jax.Array, before: jax.Array, operands: jnp.dtype) -> Vectors:
    """Scales rows by the decay factors of a level and rounds them; a takes `before`."""
    factors = Vectors(own, before, own, own)
    return Vectors(
        *(
            None if y is None else (y * factor).astype(operands)
            for y, factor in zip(x, factors, strict=True)
        )
    )


def add_pairs(sums: Pairs, x: Vectors, g: Parts, is_before: bool) -> Pairs:
    """Adds some columns' share of the scores.

    Args:
      sums: scores so far, float32.
      x: the rows, with all factors but decay.
      g: pieces of the log decays.
      is_before: whether a reads the state before its row's own decay.

    Returns:
      The sums.
    """
    i, j = indices(x.q.shape[0])
    operands = g[0].dtype

    def link(total, reads, writes, links):
        if total is None:
            return None
        return total + jnp.where(links, matmul(reads, writes, NT), 0.0)

    def add(level: Level, sums: Pairs) -> Pairs:
        own = jnp.exp(masked_sum(level.own, g))
        before = jnp.exp(masked_sum(level.before, g)) if is_before else own
        y = scale_rows(x, own, before, operands)
        return Pairs(
            link(sums.qb, y.q, y.b, level.links),
            link(sums.ab, y.a, y.b, level.links),
            link(sums.qk, y.q, y.k, level.links),
            link(sums.ak, y.a, y.k, level.links),
        )

    sums = over_levels(x.q.shape[0], add, sums)

    def own_row(total, writes):
        if total is None:
            return None
        return total + jnp.where(i == j, jnp.sum(x.q * writes, axis=1)[:, None], 0.0)

    return sums._replace(qb=own_row(sums.qb, x.b), qk=own_row(sums.qk, x.k))


class Squares(NamedTuple):
    """A chunk's matrices [C, C]; the last two are None in KDA, where they are the first two."""

    t: Any  # T
    f: Any  # F
    z: Any  # Z
    y: Any  # Y


def chunk_squares(pairs: Pairs, operands: jnp.dtype, inverse: jax.Array | None = None) -> Squares:
    """Computes the matrices of one chunk from its scores, float32.

    Args:
      pairs: the scores.
      operands: dtype of the products' operands.
      inverse: T where it is known; None computes it.
    """
    t = unit_inverse(-pairs.ab, operands) if inverse is None else inverse.astype(jnp.float32)
    f = multiply(pairs.qb, t, operands)
    if pairs.ak is None:
        return Squares(t, f, None, None)
    z = multiply(t, pairs.ak, operands)
    return Squares(t, f, z, pairs.qk + multiply(f, pairs.ak, operands))


class Ends(NamedTuple):
    """Decay factors between some columns of a chunk's rows and the chunk's ends."""

    own: jax.Array  # e^{G_t} [C, K_p]
    before: jax.Array  # e^{G_t-1}, or e^{G_t} where a reads after its row's decay
    after: jax.Array  # e^{G_C − G_t}
    whole: jax.Array  # γ [1, K_p]


def decay_to_ends(g: jax.Array, operands: jnp.dtype, is_before: bool) -> Ends:
    """Computes decay factors; g [C, K_p] float32."""
    i, j = indices(g.shape[0])
    x = pieces(g, operands)
    own = jnp.exp(masked_sum(j <= i, x))
    before = jnp.exp(masked_sum(j < i, x)) if is_before else own
    whole = jnp.exp(jnp.sum(g, axis=0)[None, :])
    return Ends(own, before, jnp.exp(masked_sum(j > i, x)), whole)


class RowTerms(NamedTuple):
    """Some columns of what meets the state, [C, K_p]."""

    w: Any  # W
    m: Any  # M
    b: Any  # B_e
    k: Any  # K_e, None in KDA


def row_terms(x: Vectors, ends: Ends, squares: Squares, operands: jnp.dtype) -> RowTerms:
    """Computes some columns of W, M, B_e and K_e, float32."""
    reads = ends.before * x.a
    return RowTerms(
        multiply(squares.t, reads, operands),
        ends.own * x.q + multiply(squares.f, reads, operands),
        ends.after * x.b,
        None if x.k is None else ends.after * x.k,
    )


def walk_chunk(
    state: Parts,
    v: jax.Array,
    w: Parts,
    m: Parts | None,
    b: Parts,
    k: Parts | None,
    z: jax.Array,
    y: jax.Array | None,
    whole: Parts,
) -> tuple[Parts, jax.Array, jax.Array | None]:
    """Takes the state over one chunk.

    Args:
      state: Sᵀ before the chunk, parts [V, k_p] float32.
      v: Vᵀ [V, C].
      w: W, parts [C, k_p].
      m: M, likewise; None leaves the output out.
      b: B_e, likewise.
      k: K_e, likewise; None writes along b alone.
      z: Z [C, C].
      y: Y [C, C].
      whole: γ, parts [1, k_p] float32.

    Returns:
      Sᵀ after the chunk, Uᵀ [V, C] in v's dtype, and Oᵀ [V, C] float32 or None.
    """
    rounded = [x.astype(v.dtype) for x in state]
    u = matmul(v, z, NT) + add_up(matmul(x, r, NT) for x, r in zip(rounded, w, strict=True))
    u = u.astype(v.dtype)
    o = None
    if m is not None:
        assert y is not None
        o = matmul(v, y, NT) + add_up(matmul(x, r, NT) for x, r in zip(rounded, m, strict=True))
    state = tuple(x * d + matmul(u, r) for x, d, r in zip(state, whole, b, strict=True))
    if k is not None:
        state = tuple(x + matmul(v, r) for x, r in zip(state, k, strict=True))
    return state, u, o


def walk_back_chunk(
    dstate: Parts,
    do: jax.Array,
    w: Parts,
    m: Parts,
    b: Parts,
    k: Parts | None,
    squares: Squares,
    whole: Parts,
) -> tuple[Parts, jax.Array, jax.Array | None]:
    """Takes the state's gradient back over one chunk.

    Args:
      dstate: gradient of Sᵀ after the chunk, parts [V, k_p] float32.
      do: dOᵀ [V, C].
      w: W, parts [C, k_p].
      m: M, likewise.
      b: B_e, likewise.
      k: K_e, likewise, or None.
      squares: T, F, Z and Y.
      whole: γ, parts [1, k_p] float32.

    Returns:
      The gradient of Sᵀ before the chunk, dRᵀ [V, C] and, unless k is None, dVᵀ, float32.
    """
    rounded = [x.astype(do.dtype) for x in dstate]
    d = add_up(matmul(x, r, NT) for x, r in zip(rounded, b, strict=True)).astype(do.dtype)
    before = tuple(
        x * c + matmul(d, r) + matmul(do, n) for x, c, r, n in zip(dstate, whole, w, m, strict=True)
    )
    dr = matmul(d, squares.t) + matmul(do, squares.f)
    if k is None:
        return before, dr, None
    dv = matmul(d, squares.z) + matmul(do, squares.y)
    return before, dr, dv + add_up(matmul(x, r, NT) for x, r in zip(rounded, k, strict=True))
