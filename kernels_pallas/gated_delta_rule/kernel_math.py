"""The chunk's mathematics as the kernels do it: pure functions of values, for one chunk and head.

Notation as in chunk_math.py, for one chunk of C rows; k and q are the rows as they were given,
r_i and m_i the factors that normalise them (m includes the scale), D the decay between rows, γ
from the chunk's start, ε to its end. With L = stril(KKᵀ ∘ D) the rule reads

    N = V − γ (K S) − L β N        so   N = T (V − γ (K S)),   T = (I + L diag(β))^-1
    O = γ (Q S) + tril(QKᵀ ∘ D) β N        S' = γ_C S + Kᵀ (ε β N)

N are the recurrence's errors v_t − S~ᵀ k_t, so β N are its δ. T is the inverse of the column-scaled
matrix, which makes the backward pass the mirror image of the forward one:

    dV = Tᵀ (ε β K dS') + Yᵀ dO     dS = γ_C dS' + Qᵀ (γ dO) − Kᵀ (γ dV)

with Y = tril(QKᵀ ∘ D) diag(β) T, so that O = γ (Q S) + Y (V − γ (K S)). N never enters O: where
keys resemble each other O adds up large N that cancel, and rounding those would be its largest
error. Everything that does not need the state is worked out beforehand for all chunks at once
(`scores`): T, Y and per row f = γ r, h = γ m and w = ε β r. What is left for the walk over the
chunks is five products, a chain of three of them and two beside it. The walk holds the
state as Sᵀ [V, K], so that on a GPU the left operand of every product of the chain is what the
last one left in registers, and only T, Y, K and Q come from shared memory.

The gradients of q, k, g and β follow in gradient_math.py.

Rows are K-column parts (tuples), since Triton wants powers of two: 96 is 64 + 32.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.backend import NN, NT, matmul, platform
from kernels_pallas.gated_delta_rule.inputs import L2_EPS

Parts = tuple[jax.Array, ...]


def indices(size: int) -> tuple[jax.Array, jax.Array]:
    """Returns the row and the column number of every entry of a [C, C] matrix."""
    shape = (size, size)
    return (
        jax.lax.broadcasted_iota(jnp.int32, shape, 0),
        jax.lax.broadcasted_iota(jnp.int32, shape, 1),
    )


def to_column(row: jax.Array) -> jax.Array:
    """Turns a row [1, C] into a column [C, 1]; on a TPU as a masked sum, which Mosaic has."""
    if platform() != "tpu":
        return row.T
    i, j = indices(row.shape[1])
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1)[:, None]


def to_row(column: jax.Array) -> jax.Array:
    """Turns a column [C, 1] into a row [1, C]."""
    if platform() != "tpu":
        return column.T
    i, j = indices(column.shape[0])
    return jnp.sum(jnp.where(i == j, column, 0.0), axis=0)[None, :]


def add_up(parts: Iterable[jax.Array]) -> jax.Array:
    """Sums one or more arrays, without a zero to start from."""
    total = None
    for part in parts:
        total = part if total is None else total + part
    assert total is not None
    return total


def between(coarse: jax.Array, fine: jax.Array) -> jax.Array:
    """Returns D [C, C], zero above the diagonal.

    Args:
      coarse: running sum of the decays' coarse parts, [1, C] (see gates.py: differences of
        coarse sums are exact).
      fine: running sum of the rests, [1, C].
    """
    i, j = indices(coarse.shape[1])
    log = (to_column(coarse) - coarse) + (to_column(fine) - fine)
    return jnp.exp(jnp.where(i >= j, log, -jnp.inf))


def normalisers(q: Parts, k: Parts, scale: float, use_qk_l2norm: bool) -> tuple[jax.Array, ...]:
    """Returns the factors m and r of query and key rows, [C, 1] float32."""
    size = k[0].shape[0]
    if not use_qk_l2norm:
        return jnp.full((size, 1), scale, jnp.float32), jnp.full((size, 1), 1.0, jnp.float32)
    squares = (
        add_up(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1)[:, None] for x in rows)
        for rows in (q, k)
    )
    m, r = (jax.lax.rsqrt(x + L2_EPS) for x in squares)
    return m * scale, r


def _high_low(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def unit_inverse(a: jax.Array, operands: jnp.dtype) -> jax.Array:
    """Inverts I + a, a strictly lower triangular [C, C], C a power of two.

    Blocks of 2 are known; each round joins pairs of inverted blocks: with the part a' of `a` that
    links them, X − X a' X is the inverse of the joined block. Every intermediate is an exact
    inverse of a part of I + a, so nothing grows that must cancel later, as powers of `a` do for
    keys that resemble each other.

    With bfloat16 operands the rounds are run in bfloat16 and one Newton step, X + X (I − (I+a) X),
    repairs the result: rounded X is exact in bfloat16, so two products with the halves of `a`
    give the residual to 1e-5. Error 1e-5 to 6e-5, at 13 products instead of the 30 of a ladder of
    split operands, and far under the 1e-3 of storing the result in bfloat16.

    Args:
      a: the strictly lower triangular matrix, float32.
      operands: dtype of the products' operands, bfloat16 or float32.

    Returns:
      The inverse, float32.
    """
    i, j = indices(a.shape[0])

    def mul(x, y):
        return matmul(x.astype(operands), y.astype(operands))

    x = jnp.where(i == j, 1.0, 0.0) - jnp.where((i >> 1) == (j >> 1), a, 0.0)
    bits = 1
    while (2 << bits) <= a.shape[0]:
        # Links the odd block of 2^bits rows to the even one before it.
        links = ((i >> bits) == (j >> bits) + 1) & (((i >> bits) & 1) == 1)
        x = x - mul(mul(x, jnp.where(links, a, 0.0)), x)
        bits += 1
    if operands == jnp.bfloat16:
        rounded = x.astype(operands)
        high, low = _high_low(a)
        product = rounded.astype(jnp.float32) + (matmul(low, rounded) + matmul(high, rounded))
        x = rounded.astype(jnp.float32) + mul(x, jnp.where(i == j, 1.0, 0.0) - product)
    return x


class Scores(NamedTuple):
    """What one chunk alone determines; a field that a kernel does not need is None.

    The same structure holds the values of a chunk, references to them in a kernel, block specs, and
    the arrays of all chunks.
    """

    inverse: Any  # T [C, C], in the operands' dtype
    scores: Any  # Y [C, C], in the operands' dtype
    read_k: Any  # f = γ r, [1, C]
    read_q: Any  # h = γ m, [1, C]
    write: Any  # w = ε β r, [1, C]


class Gates(NamedTuple):
    """A chunk's decays and writing strengths, rows [1, C] float32 (see gates.py)."""

    coarse: jax.Array
    fine: jax.Array
    beta: jax.Array
    from_start: jax.Array  # γ
    to_end: jax.Array  # ε


def chunk_scores(
    q: Parts,
    k: Parts,
    gates: Gates,
    scale: float,
    use_qk_l2norm: bool,
    inverse: jax.Array | None = None,
) -> Scores:
    """Computes T, Y and the row factors of one chunk.

    Y is multiplied to float32 accuracy from unrounded factors and rounded once.

    Args:
      q: query rows, parts [C, k_p].
      k: key rows, parts [C, k_p].
      gates: the chunk's gates.
      scale: factor on the queries.
      use_qk_l2norm: normalise rows.
      inverse: T in the operands' dtype where it is known; None computes it.

    Returns:
      The chunk's `Scores`.
    """
    dtype = k[0].dtype
    m, r = normalisers(q, k, scale, use_qk_l2norm)
    r_row = to_row(r)
    decay = between(gates.coarse, gates.fine)
    across = decay * (r_row * gates.beta)
    scores = add_up(matmul(a, b, NT) for a, b in zip(q, k, strict=True)) * m * across
    exact = inverse
    if exact is None:
        i, j = indices(decay.shape[0])
        gram = add_up(matmul(a, a, NT) for a in k) * r * across
        exact = unit_inverse(jnp.where(i > j, gram, 0.0), dtype)
    return Scores(
        exact.astype(dtype),
        _exactly(scores, exact, dtype).astype(dtype),
        gates.from_start * r_row,
        gates.from_start * to_row(m),
        gates.to_end * gates.beta * r_row,
    )


def _exactly(x: jax.Array, y: jax.Array, operands: jnp.dtype) -> jax.Array:
    """Multiplies float32 x with y to 1e-5 or better, whatever the operands' dtype."""
    if operands == jnp.float32:
        return matmul(x, y)
    high, low = _high_low(x)
    if y.dtype == operands:
        return matmul(low, y) + matmul(high, y)
    y_high, y_low = _high_low(y)
    return (matmul(low, y_high) + matmul(high, y_low)) + matmul(high, y_high)


def walk_chunk(
    state: Parts, q: Parts | None, k: Parts, v: jax.Array, s: Scores, decay: jax.Array
) -> tuple[Parts, jax.Array, jax.Array | None]:
    """Takes the state over one chunk.

    Args:
      state: Sᵀ before the chunk, parts [V, k_p] float32.
      q: query rows, parts [C, k_p]; None leaves the output out.
      k: key rows, parts [C, k_p].
      v: Vᵀ [V, C], float32.
      s: the chunk's scores.
      decay: γ_C, broadcast against [V, K].

    Returns:
      Sᵀ after the chunk, Nᵀ [V, C] in the operands' dtype, and Oᵀ [V, C] float32 or None.
    """
    dtype = k[0].dtype
    rounded = [x.astype(dtype) for x in state]
    read = add_up(matmul(x, y, NT) for x, y in zip(rounded, k, strict=True))
    error = (v - read * s.read_k).astype(dtype)
    news = matmul(error, s.inverse, NT)
    o = None
    if q is not None:
        o = add_up(matmul(x, y, NT) for x, y in zip(rounded, q, strict=True)) * s.read_q
        o = o + matmul(error, s.scores, NT)
    written = (news * s.write).astype(dtype)
    state = tuple(x * decay + matmul(written, y, NN) for x, y in zip(state, k, strict=True))
    return state, news.astype(dtype), o


def walk_back_chunk(
    dstate: Parts, q: Parts, k: Parts, do: jax.Array, s: Scores, decay: jax.Array
) -> tuple[Parts, jax.Array]:
    """Takes the state's gradient back over one chunk.

    Args:
      dstate: gradient of Sᵀ after the chunk, parts [V, k_p] float32.
      q: query rows, parts [C, k_p].
      k: key rows, parts [C, k_p].
      do: dOᵀ [V, C], in the operands' dtype.
      s: the chunk's scores.
      decay: γ_C, broadcast against [V, K].

    Returns:
      The gradient of Sᵀ before the chunk, and dVᵀ [V, C] float32.
    """
    dtype = k[0].dtype
    z = add_up(matmul(x.astype(dtype), y, NT) for x, y in zip(dstate, k, strict=True)) * s.write
    dv = matmul(z.astype(dtype), s.inverse, NN) + matmul(do, s.scores, NN)
    by_q = (do.astype(jnp.float32) * s.read_q).astype(dtype)
    by_k = (dv * s.read_k).astype(dtype)
    dstate = tuple(
        x * decay + matmul(by_q, a, NN) - matmul(by_k, b, NN)
        for x, a, b in zip(dstate, q, k, strict=True)
    )
    return dstate, dv
