"""Kernel: the gradients of the scores of pairs of rows, for all chunks at once.

    tril(dO Uᵀ)    tril(dR Uᵀ)    tril(dO Vᵀ)    tril(dR Vᵀ)

and the like: of each kind of reads' gradients with each kind of what was written, over V. One
program takes one chunk of one head on a GPU, several on a TPU. A kernel of its own, for the next
one goes over K in parts that each need these matrices. Read: 2 V bytes a token of each kind;
written: 128 a token and matrix, twice that for one in two pieces.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NT, matmul
from kernels_pallas.gated_delta_rule.kernel_math import indices
from kernels_pallas.gated_delta_rule.layout import Layout, span
from kernels_pallas.vector_decay_math import pieces


class PairGradients(NamedTuple):
    """The gradients of scores, by the kinds of reads and then of writes.

    The same structure holds arrays, references to them in a kernel, and block specs.
    """

    below: Any  # tuples of pieces that add up to them [B, H, T, C], zero above the diagonal
    own: Any  # their diagonals [B, H, N, C] float32


def diagonal(x: jax.Array) -> jax.Array:
    """Returns the diagonal of a matrix [C, C] as a row [1, C]."""
    i, j = indices(x.shape[0])
    return jnp.sum(jnp.where(i == j, x, 0.0), axis=0)[None, :]


def _body(reads, writes, out: PairGradients, *, chunks, chunk_size, v_step):
    steps = writes[0].shape[-1] // v_step

    def chunk(n, carry):
        rows = span(n, chunk_size)

        def add(step, sums):
            at = rows, span(step, v_step)
            left, right = ([ref[at] for ref in refs] for refs in (reads, writes))
            return tuple(
                tuple(total + matmul(x, y, NT) for total, y in zip(totals, right, strict=True))
                for totals, x in zip(sums, left, strict=True)
            )

        zeros = jnp.zeros((chunk_size, chunk_size), jnp.float32)
        sums = backend.loop(steps, add, ((zeros,) * len(writes),) * len(reads))
        i, j = indices(chunk_size)
        for totals, below, own in zip(sums, out.below, out.own, strict=True):
            for total, refs, ref in zip(totals, below, own, strict=True):
                cut = pieces(jnp.where(i >= j, total, 0.0), reads[0].dtype)
                for piece_ref, piece in zip(refs, cut, strict=False):
                    piece_ref[rows, :] = piece.astype(piece_ref.dtype)
                ref[pl.ds(n, 1), :] = diagonal(total)
        return carry

    backend.loop(chunks, chunk, 0)


def pair_gradients(
    reads: Sequence[jax.Array],
    writes: Sequence[jax.Array],
    num_pieces: Sequence[int],
    *,
    name: str,
    chunk_size: int,
    chunks: int,
    v_step: int,
    schedule: tuple[int, int],
) -> PairGradients:
    """Computes the gradients of scores.

    Args:
      reads: of each kind of reads the gradient of what it read, in the kernels' layout.
      writes: of each kind of writes what was written, likewise.
      num_pieces: for each kind of writes how many pieces its scores' gradients are kept in: 1, or 2
        for 16 bits of precision where operands are bfloat16.
      name: of the kernel.
      chunk_size: C.
      chunks: chunks a program.
      v_step: columns of V to take at a time; 0 is all.
      schedule: warps and stages (GPU).
    """
    reads, writes = tuple(reads), tuple(writes)
    shape, dtype = writes[0].shape, writes[0].dtype
    batch, width = shape[0], shape[-1]
    heads, length = shape[1:3] if backend.platform() == "tpu" else shape[2:0:-1]
    layout = Layout(1, lambda c: c)

    def outputs(matrix, row):
        counts = [1 if dtype == jnp.float32 else n for n in num_pieces]
        kinds = tuple((matrix,) * n for n in counts)
        return PairGradients((kinds,) * len(reads), ((row,) * len(kinds),) * len(reads))

    shapes = outputs(
        jax.ShapeDtypeStruct((batch, heads, length, chunk_size), dtype),
        jax.ShapeDtypeStruct((batch, heads, length // chunk_size, chunk_size), jnp.float32),
    )
    rows = layout.rows(chunks * chunk_size, width)
    (out,) = backend.pallas(
        functools.partial(_body, chunks=chunks, chunk_size=chunk_size, v_step=v_step or width),
        name=name,
        grid=(batch, heads, length // chunk_size // chunks),
        in_specs=[(rows,) * len(reads), (rows,) * len(writes)],
        out_specs=[
            outputs(
                layout.per_chunk(chunks * chunk_size, chunk_size),
                layout.per_chunk(chunks, chunk_size),
            )
        ],
        out_shape=[shapes],
        fastest_first=(1, 2, 0),
        num_warps=schedule[0],
        num_stages=schedule[1],
    )(reads, writes)
    return out
