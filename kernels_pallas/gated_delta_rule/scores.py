"""First kernel: what one chunk alone determines, for all chunks at once.

    A = stril(r KKᵀ r ∘ D) diag(β)    T = (I + A)^-1    P' = tril(m QKᵀ r ∘ D) diag(β)

(kernel_math.py has the notation.) One program takes one chunk of one value head on a GPU, eight on
a TPU, and keeps everything in registers (VMEM): K and Q rows, two [C, C] products and the inverse.
Read: k, q (192 + 192 bytes a token and head at K = 96 in bfloat16) and five gates of 4 bytes.
Written: T and P' (128 bytes each), and three row factors. Arithmetic: 2 products over K and 13 of
[C, C] for the inverse, so the tensor cores have about as much to do as the memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.gates import GateRows
from kernels_pallas.gated_delta_rule.kernel_math import Gates, Parts, Scores, chunk_scores
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, span


def read_gates(refs: GateRows, i: Any) -> Gates:
    """Reads the gates of chunk i from references to [chunks, C]."""
    return Gates(*(ref[pl.ds(i, 1), :] for ref in refs))


def _body(q_ref, k_ref, gate_refs, out_refs, *, chunks, parts, scale, use_qk_l2norm):
    halves = len(out_refs.scores)

    def chunk(i, carry):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)
        gates, with_inverse = read_gates(gate_refs, i), out_refs.inverse is not None
        out = chunk_scores(q, k, gates, scale, use_qk_l2norm, with_inverse, halves)
        for refs, values in ((out_refs.inverse, out.inverse), (out_refs.scores, out.scores)):
            for ref, value in zip(refs or (), values or (), strict=True):
                ref[rows, :] = value
        out_refs.read_k[row, :] = out.read_k
        out_refs.read_q[row, :] = out.read_q
        out_refs.write[row, :] = out.write
        return carry

    if chunks == 1:
        chunk(0, 0)
    else:
        jax.lax.fori_loop(0, chunks, chunk, 0)


def scores(
    q: jax.Array,
    k: jax.Array,
    gates: GateRows,
    *,
    blocks: Blocks,
    scale: float,
    use_qk_l2norm: bool,
    halves: int = 1,
    inverse: Parts | None = None,
) -> Scores:
    """Computes every chunk's `Scores`.

    Args:
      q: queries in the kernels' layout.
      k: keys in the kernels' layout.
      gates: the gates; their T is the padded one.
      blocks: sizes.
      scale: factor on the queries.
      use_qk_l2norm: normalise rows.
      halves: matrices that T and P' are stored as, 1 or 2.
      inverse: T where it is known; None computes it.

    Returns:
      T and P' [B, HV, T, C] in q's dtype, and the factors [B, HV, N, C] float32.
    """
    batch, heads, count, _ = gates.beta.shape
    key_heads = q.shape[1 if backend.platform() == "tpu" else 2]
    n, width = blocks.chunks, q.shape[-1]
    layout = Layout(heads // key_heads, lambda i: i)
    rows = layout.rows(n * CHUNK, width, value_head=False)
    matrix, row = layout.per_chunk(n * CHUNK, CHUNK), layout.per_chunk(n, CHUNK)
    square = jax.ShapeDtypeStruct((batch, heads, count * CHUNK, CHUNK), q.dtype)
    factor = jax.ShapeDtypeStruct((batch, heads, count, CHUNK), jnp.float32)

    def outputs(matrix, row):
        matrices = (matrix,) * halves
        return Scores(matrices if inverse is None else None, matrices, row, row, row)

    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(width), scale=scale, use_qk_l2norm=use_qk_l2norm
        ),
        name="gated_delta_scores",
        grid=(batch, heads, count // n),
        in_specs=[rows, rows, GateRows(*[row] * 5)],
        out_specs=[outputs(matrix, row)],
        out_shape=[outputs(square, factor)],
        fastest_first=(1, 2, 0),
        num_warps=blocks.scores[0],
        num_stages=blocks.scores[1],
    )(q, k, gates)
    return out if inverse is None else out._replace(inverse=inverse)
