"""First kernel: what one chunk alone determines, for all chunks at once.

    A = stril(r KKᵀ r ∘ D) diag(β)    T = (I + A)^-1    Y = tril(m QKᵀ r ∘ D) diag(β) T

(kernel_math.py has the notation.) One program takes one chunk of one value head on a GPU, eight on
a TPU, and keeps everything in registers (VMEM): K and Q rows, two [C, C] products and the inverse.
Read: k, q (192 + 192 bytes a token and head at K = 96 in bfloat16) and five gates of 4 bytes.
Written: T and Y (128 bytes each), and three row factors. Arithmetic: 2 products over K, 13 of
[C, C] for the inverse and 3 for Y, so the tensor cores have about as much to do as the memory.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.gates import GateRows
from kernels_pallas.gated_delta_rule.kernel_math import Gates, Scores, chunk_scores
from kernels_pallas.gated_delta_rule.layout import Layout, column_parts, load, span


def read_gates(refs: GateRows, i: Any) -> Gates:
    """Reads the gates of chunk i from references to [chunks, C]."""
    return Gates(*(ref[pl.ds(i, 1), :] for ref in refs))


def _body(q_ref, k_ref, gate_refs, known_ref, out, *, chunks, parts, scale, use_qk_l2norm):
    def chunk(i, carry):
        rows, row = span(i, CHUNK), pl.ds(i, 1)
        q, k = load(q_ref, rows, parts), load(k_ref, rows, parts)
        known = None if known_ref is None else known_ref[rows, :]
        found = chunk_scores(q, k, read_gates(gate_refs, i), scale, use_qk_l2norm, known)
        if out.inverse is not None:
            out.inverse[rows, :] = found.inverse
        out.scores[rows, :] = found.scores
        out.read_k[row, :] = found.read_k
        out.read_q[row, :] = found.read_q
        out.write[row, :] = found.write
        return carry

    backend.loop(chunks, chunk, 0)


def scores(
    q: jax.Array,
    k: jax.Array,
    gates: GateRows,
    *,
    blocks: Blocks,
    scale: float,
    use_qk_l2norm: bool,
    inverse: jax.Array | None = None,
) -> Scores:
    """Computes every chunk's `Scores`.

    Args:
      q: queries in the kernels' layout.
      k: keys in the kernels' layout.
      gates: the gates; their T is the padded one.
      blocks: sizes.
      scale: factor on the queries.
      use_qk_l2norm: normalise rows.
      inverse: T where it is known; None computes it.

    Returns:
      T and Y [B, HV, T, C] in q's dtype, and the factors [B, HV, N, C] float32.
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
        return Scores(matrix if inverse is None else None, matrix, row, row, row)

    (out,) = backend.pallas(
        functools.partial(
            _body, chunks=n, parts=column_parts(width), scale=scale, use_qk_l2norm=use_qk_l2norm
        ),
        name="gated_delta_scores",
        grid=(batch, heads, count // n),
        in_specs=[rows, rows, GateRows(*[row] * 5), None if inverse is None else matrix],
        out_specs=[outputs(matrix, row)],
        out_shape=[outputs(square, factor)],
        fastest_first=(1, 2, 0),
        num_warps=blocks.scores[0],
        num_stages=blocks.scores[1],
    )(q, k, gates, inverse)
    return out if inverse is None else out._replace(inverse=inverse)
