"""First kernel: what one chunk alone determines, for all chunks at once.

    T = (I − A_ab)^-1    F = A_qb T    W = T Â    M = Q̂ + F Â    Z = T A_ak    Y = A_qk + F A_ak
    B_e = b e^{G_C − G}    K_e = k e^{G_C − G}    γ = e^{G_C}

(kernel_math.py has the notation, vector_decay_math.py the decay between rows.) One program takes
one chunk of one head on a GPU, eight on a TPU. It goes over K twice, a part at a time: for the
scores of pairs, which end as matrices [C, C] in registers (VMEM), then for W, M, B_e and K_e.
Read: q, k (and a, b) and g. Written, a token and head: W, M and B_e (and K_e), K values each; T and
F (and Z and Y), C values each; KDA at K = 128 in bfloat16 reads 1.0 KB and writes 1.0 KB.
Arithmetic: a product [C, C] x [C, K] for the sums of log decays, twice in bfloat16, and one of
[C, K] x [K, C] for each pair of a reading and a writing vector, at one step where decays are
bounded and at up to log2(C) levels where not; six [C, C] x [C, K] for W and M.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.dplr.blocks import part_width
from kernels_pallas.dplr.kernel_math import (
    Pairs,
    RowTerms,
    Squares,
    Vectors,
    add_pairs,
    chunk_squares,
    row_terms,
    scale_reads,
)
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import to_column
from kernels_pallas.gated_delta_rule.layout import Layout, row_shape, span
from kernels_pallas.vector_decay_math import chunk_bits, end_factors


class Inputs(NamedTuple):
    """The arrays of the kernels, in their layout; in a kernel references to a program's part."""

    q: Any
    k: Any
    a: Any  # None in KDA, where a and b are multiples of k
    b: Any
    g: Any  # float32, with borders
    factors: Any  # of q, a and b: rows [B, H, N, C] float32; None is the scale and 1


class Prepared(NamedTuple):
    """What the kernel computes of all chunks."""

    rows: RowTerms  # in the kernels' layout
    squares: Squares  # [B, H, T, C]
    whole: Any  # γ [B, H, N, K] float32


def read_vectors(refs: Inputs, rows: Any, row: Any, columns: Any, scale: float) -> Vectors:
    """Reads some columns of rows, scaled by all factors but decay; `row`: where those stand."""
    q, k = (ref[rows, columns].astype(jnp.float32) for ref in (refs.q, refs.k))
    if refs.a is None:
        of_q, of_a, of_b = (to_column(ref[row]) for ref in refs.factors)
        return Vectors(of_q * q, of_a * k, of_b * k, None)
    a, b = (ref[rows, columns].astype(jnp.float32) for ref in (refs.a, refs.b))
    return Vectors(scale * q, a, b, k)


def store(ref: Any, at: Any, value: Any) -> None:
    """Writes where there is a reference to write to."""
    if ref is not None:
        ref[at] = value.astype(ref.dtype)


def _body(refs: Inputs, known_ref, out: Prepared, *, chunks, part, scale):
    is_before = refs.a is not None
    operands, count = refs.q.dtype, refs.q.shape[-1] // part

    def chunk(i, carry):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        bits = chunk_bits(refs.g, rows, part, CHUNK, operands)

        def pairs(p, sums):
            columns = span(p, part)
            x = read_vectors(refs, rows, (row, slice(None)), columns, scale)
            return add_pairs(sums, x, refs.g[rows, columns], bits, operands, is_before)

        zeros = jnp.zeros((CHUNK, CHUNK), jnp.float32)
        others = zeros if is_before else None
        sums = backend.loop(count, pairs, Pairs(zeros, zeros, others, others))
        known = None if known_ref is None else known_ref[rows, :]
        squares = chunk_squares(sums, operands, known)
        for ref, value in zip(out.squares, squares, strict=True):
            store(ref, (rows, slice(None)), value)

        def terms(p, carry):
            columns = span(p, part)
            g = refs.g[rows, columns]
            x = read_vectors(refs, rows, (row, slice(None)), columns, scale)
            x, ends = scale_reads(x, jnp.exp(g), is_before), end_factors(g, operands)
            for ref, value in zip(out.rows, row_terms(x, ends, squares, operands), strict=True):
                store(ref, (rows, columns), value)
            out.whole[row, columns] = ends.whole
            return carry

        backend.loop(count, terms, 0)
        return carry

    backend.loop(chunks, chunk, 0)


def input_specs(inputs: Inputs, layout: Layout, chunks: int) -> Inputs:
    """Returns the block specs of the inputs."""
    width = inputs.q.shape[-1]
    keys = layout.rows(chunks * CHUNK, width, value_head=False)
    own = layout.rows(chunks * CHUNK, width)
    row = layout.per_chunk(chunks, CHUNK)
    specs = Inputs(keys, keys, keys, keys, own, (row, row, row))
    return Inputs(*(s if x is not None else None for s, x in zip(specs, inputs, strict=True)))


def prepare(
    inputs: Inputs, *, blocks: Blocks, scale: float, inverse: jax.Array | None = None
) -> Prepared:
    """Computes every chunk's `Prepared`.

    Args:
      inputs: the inputs; their T is the padded one.
      blocks: sizes.
      scale: factor on the queries where `inputs` has no factors.
      inverse: T where it is known; None computes it.

    Returns:
      Rows and matrices in q's dtype, γ in float32.
    """
    is_tpu = backend.platform() == "tpu"
    shape = inputs.g.shape
    batch, heads, length = (shape[0], *(shape[1:3] if is_tpu else shape[2:0:-1]))
    key_heads, width = inputs.q.shape[1 if is_tpu else 2], inputs.q.shape[-1]
    n = blocks.chunks
    layout = Layout(heads // key_heads, lambda i: i)
    rows, matrix = layout.rows(n * CHUNK, width), layout.per_chunk(n * CHUNK, CHUNK)
    dtype = inputs.q.dtype
    square = jax.ShapeDtypeStruct((batch, heads, length, CHUNK), dtype)
    row = row_shape(batch, length, heads, width, dtype)
    has_k = inputs.a is not None
    whole = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, width), jnp.float32)

    def outputs(row, square, whole):
        other = square if has_k else None
        return Prepared(
            RowTerms(row, row, row, row if has_k else None),
            Squares(square if inverse is None else None, square, other, other),
            whole,
        )

    (out,) = backend.pallas(
        functools.partial(_body, chunks=n, part=part_width(backend.platform(), width), scale=scale),
        name="dplr_prepare" if has_k else "kda_prepare",
        grid=(batch, heads, length // CHUNK // n),
        in_specs=[input_specs(inputs, layout, n), None if inverse is None else matrix],
        out_specs=[outputs(rows, matrix, layout.per_chunk(n, width))],
        out_shape=[outputs(row, square, whole)],
        fastest_first=(1, 2, 0),
        num_warps=blocks.scores[0],
        num_stages=blocks.scores[1],
    )(inputs, inverse)
    return out if inverse is None else out._replace(squares=out.squares._replace(t=inverse))
