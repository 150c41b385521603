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

Decay between rows and to the chunk's ends: vector_decay_math.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NT, matmul
from kernels_pallas.gated_delta_rule.kernel_math import Parts, add_up, indices, unit_inverse
from kernels_pallas.vector_decay_math import Ends, add_scores, pieces


class Vectors(NamedTuple):
    """Some columns of a chunk's rows, or what belongs to them, [C, K_p] float32."""

    q: Any
    a: Any
    b: Any
    k: Any  # None in KDA

    @property
    def reads(self) -> tuple[Any, ...]:
        """What belongs to the rows that read."""
        return self.q, self.a

    @property
    def writes(self) -> tuple[Any, ...]:
        """What belongs to the rows that write."""
        return (self.b,) if self.k is None else (self.b, self.k)


def scale_reads(x: Vectors, own: jax.Array, is_before: bool) -> Vectors:
    """Scales what reads after its row's own decay e^g: q, and a unless `is_before`."""
    return x._replace(q=own * x.q, a=x.a if is_before else own * x.a)


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
    """Scores of pairs of rows [C, C], or what belongs to them; the last two are None in KDA."""

    qb: Any
    ab: Any
    qk: Any
    ak: Any

    @property
    def nested(self) -> tuple[tuple[Any, ...], ...]:
        """By reads, then by writes."""
        if self.qk is None:
            return (self.qb,), (self.ab,)
        return (self.qb, self.qk), (self.ab, self.ak)


def add_pairs(
    sums: Pairs, x: Vectors, g: jax.Array, bits: Any, operands: jnp.dtype, is_before: bool
) -> Pairs:
    """Adds some columns' share of the scores.

    Args:
      sums: scores so far, float32.
      x: the rows, with all factors but decay.
      g: log decays.
      bits: see `vector_decay_math.base_bits`.
      operands: dtype of the products' operands.
      is_before: whether a reads the state before its row's own decay.

    Returns:
      The sums.
    """
    i, j = indices(x.q.shape[0])
    y = scale_reads(x, jnp.exp(g), is_before)
    of_q, of_a = add_scores(sums.nested, y.reads, y.writes, g, bits, operands)
    # A row's own writing is read as it is.
    own = [jnp.where(i == j, jnp.sum(x.q * w, axis=1)[:, None], 0.0) for w in x.writes]
    of_q = [total + y for total, y in zip(of_q, own, strict=True)]
    return Pairs(of_q[0], of_a[0], *((None, None) if x.k is None else (of_q[1], of_a[1])))


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


class RowTerms(NamedTuple):
    """Some columns of what meets the state, [C, K_p]."""

    w: Any  # W
    m: Any  # M
    b: Any  # B_e
    k: Any  # K_e, None in KDA


def row_terms(x: Vectors, ends: Ends, squares: Squares, operands: jnp.dtype) -> RowTerms:
    """Computes some columns of W, M, B_e and K_e, float32.

    Args:
      x: the rows, scaled by `scale_reads`.
      ends: the decay to the chunk's ends.
      squares: T and F.
      operands: dtype of the products' operands.
    """
    reads = ends.before * x.a
    return RowTerms(
        multiply(squares.t, reads, operands),
        ends.before * x.q + multiply(squares.f, reads, operands),
        ends.after * x.b,
        None if x.k is None else ends.after * x.k,
    )


def walk_chunk(
    state: Parts,
    v: jax.Array | None,
    w: Parts,
    m: Parts | None,
    b: Parts,
    k: Parts | None,
    z: jax.Array | None,
    y: jax.Array | None,
    whole: Parts,
) -> tuple[Parts, jax.Array, jax.Array | None]:
    """Takes the state over one chunk.

    Args:
      state: Sᵀ before the chunk, parts [V, k_p] float32.
      v: Vᵀ [V, C]; None is zeros.
      w: W, parts [C, k_p].
      m: M, likewise; None leaves the output out.
      b: B_e, likewise.
      k: K_e, likewise; None writes along b alone.
      z: Z [C, C]; with v.
      y: Y [C, C]; with v and m.
      whole: γ, parts [1, k_p] float32.

    Returns:
      Sᵀ after the chunk, Uᵀ [V, C] in w's dtype, and Oᵀ [V, C] float32 or None.
    """
    operands = w[0].dtype
    rounded = [x.astype(operands) for x in state]
    u = add_up(matmul(x, r, NT) for x, r in zip(rounded, w, strict=True))
    if v is not None:
        assert z is not None
        u = matmul(v, z, NT) + u
    u = u.astype(operands)
    o = None
    if m is not None:
        assert y is not None and v is not None
        o = matmul(v, y, NT) + add_up(matmul(x, r, NT) for x, r in zip(rounded, m, strict=True))
    state = tuple(x * d + matmul(u, r) for x, d, r in zip(state, whole, b, strict=True))
    if k is not None and v is not None:
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
