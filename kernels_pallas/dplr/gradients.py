"""Fifth kernel of the way back: the gradients of q, a, b, k and g, for all chunks at once.

    dO Sᵀ    dR Sᵀ    U dS'ᵀ   V dS'ᵀ    rowsum_V(S ∘ dS')          with the states

and those of the scores (pair_gradients.py) through the decays, which are worked out anew
(gradient_math.py; how rows and K are cut: half_chunks.py). Read, for each part of K: dO, dR, U (and
V) and the scores' gradients; once: S and dS'; q, k (a, b) and g once, and again for the other half.
Written: dq, dk (da, db) and dg.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.backend import NN, matmul
from kernels_pallas.dplr.blocks import gradient_part
from kernels_pallas.dplr.gradient_math import row_gradients
from kernels_pallas.dplr.kernel_math import Vectors
from kernels_pallas.dplr.prepare import Inputs, read_vectors
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.kernel_math import to_column, to_row
from kernels_pallas.gated_delta_rule.layout import row_shape, span
from kernels_pallas.half_chunks import FASTEST_FIRST, HalfChunks
from kernels_pallas.pair_gradients import PairGradients
from kernels_pallas.vector_decay_math import chunk_bits


class Walks(NamedTuple):
    """What the walks left behind, in the kernels' layout."""

    do: Any
    dr: Any
    u: Any
    v: Any  # None in KDA
    states: Any  # transposed, before each chunk [B, H, N, V, K]
    dstates: Any  # gradients of those after each chunk


class Gradients(NamedTuple):
    """The gradients, in the kernels' layout."""

    q: Any  # of q times its factor
    k: Any  # of k; in KDA of k times its normaliser
    a: Any  # None in KDA
    b: Any  # None in KDA
    g: Any  # float32
    beyond: Any  # what is to be added to g: see `half_chunks.with_beyond`
    beta: Any  # KDA: gradient of β by what is written along b, [B, H, N, C] float32


def _state_products(w: Walks, i: Any, rows: Any, v_step: int) -> tuple[Vectors, jax.Array]:
    """Returns dQ̂, dÂ, dB_e, dK_e and dγ."""

    def add(j, carry):
        at = span(j, v_step)
        sums, dwhole = carry
        state, dstate = w.states[i, at, :], w.dstates[i, at, :]
        do, dr, u = (ref[rows, at] for ref in (w.do, w.dr, w.u))
        products = state.astype(jnp.float32) * dstate.astype(jnp.float32)
        sums = Vectors(
            sums.q + matmul(do, state, NN),
            sums.a + matmul(dr, state, NN),
            sums.b + matmul(u, dstate, NN),
            None if w.v is None else sums.k + matmul(w.v[rows, at], dstate, NN),
        )
        return sums, dwhole + jnp.sum(products, axis=0)[None, :]

    part = w.states.shape[-1]
    zeros = jnp.zeros((rows.size, part), jnp.float32)
    start = Vectors(zeros, zeros, zeros, None if w.v is None else zeros)
    first = jnp.zeros((1, part), jnp.float32)
    return backend.loop(w.u.shape[-1] // v_step, add, (start, first))


def _body(
    half_ref,
    own: Inputs,
    other: Inputs | None,
    w: Walks,
    below: dict[tuple[bool, bool], Any],
    own_pairs,
    beta_ref,
    out: Gradients,
    *,
    chunks,
    size,
    v_step,
    scale,
):
    is_before, operands = own.a is not None, own.q.dtype

    def chunk(i, carry):
        rows, row = span(i, size), (pl.ds(i, 1), slice(None))
        at = rows, slice(None)

        def give(refs):
            return lambda: (read_vectors(refs, rows, row, slice(None), scale), refs.g[at])

        def block(reads_other, writes_other):
            return jax.tree.map(lambda ref: ref[at], below[reads_other, writes_other])

        found = row_gradients(
            give(own),
            None if other is None else give(other),
            block,
            tuple(to_column(ref[row]) for ref in own_pairs),
            *_state_products(w, i, rows, v_step),
            half_ref is not None and half_ref[0] == 1,
            chunk_bits(own.g, rows, own.g.shape[-1], size, operands),
            operands,
            is_before,
        )
        d = found.rows
        out.g[at] = found.g
        out.q[at] = d.q.astype(out.q.dtype)
        if found.beyond is not None:
            out.beyond[row] = found.beyond
        if is_before:
            for ref, y in zip((out.a, out.b, out.k), d[1:], strict=True):
                ref[at] = y.astype(ref.dtype)
        else:  # a = −k and b = β k of the normalised keys
            x, _ = give(own)()
            out.k[at] = (to_column(beta_ref[row]) * d.b - d.a).astype(out.k.dtype)
            out.beta[row] = to_row(-jnp.sum(x.a * d.b, axis=1)[:, None])
        return carry

    backend.loop(chunks, chunk, 0)


def gradients(
    inputs: Inputs,
    walks: Walks,
    pairs: PairGradients,
    beta: jax.Array | None,
    *,
    blocks: Blocks,
    scale: float,
    dtype: Any,
) -> Gradients:
    """Computes the gradients of what `prepare` took.

    Args:
      inputs: its inputs.
      walks: what the walks left behind.
      pairs: gradients of the scores.
      beta: KDA's β, rows [B, H, N, C] float32; None otherwise.
      blocks: sizes.
      scale: factor on the queries where `inputs` has no factors.
      dtype: of the gradients of q, k, a and b.

    Returns:
      The gradients; q and k of KDA for each value head.
    """
    batch, heads, count, width, key_width = walks.states.shape
    key_heads = inputs.q.shape[1 if backend.platform() == "tpu" else 2]
    part = gradient_part(backend.platform(), key_width)
    cut = HalfChunks(CHUNK, blocks.chunks, part, heads // key_heads)
    is_kda = inputs.a is None

    def input_specs(own):
        keys = cut.rows(part, own=own, is_part=True, value_head=False)
        g, row = cut.rows(part, own=own, is_part=True), cut.lanes(own=own)
        specs = Inputs(keys, keys, keys, keys, g, (row, row, row))
        return Inputs(*(s if x is not None else None for s, x in zip(specs, inputs, strict=True)))

    meetings = [(False, False)] + [(False, True), (True, False)] * (cut.halves > 1)
    below_specs = {
        (reads, writes): jax.tree.map(
            lambda _: cut.matrix(reads=not reads, writes=not writes),  # noqa: B023
            pairs.below,
        )
        for reads, writes in meetings
    }
    values, state, row = cut.rows(width), cut.state(width), cut.lanes()

    def outputs(key, g, row, half):
        no_kda, kda = (None if is_kda else key), (row if is_kda else None)
        return Gradients(key, key, no_kda, no_kda, g, half if cut.halves > 1 else None, kda)

    length, parts = count * CHUNK, key_width // part
    shapes = outputs(
        row_shape(batch, length, heads, key_width, dtype),
        row_shape(batch, length, heads, key_width, jnp.float32),
        jax.ShapeDtypeStruct((parts, batch, heads, count, CHUNK), jnp.float32),
        jax.ShapeDtypeStruct((batch, heads, count * cut.halves, key_width), jnp.float32),
    )
    rows = cut.rows(part, is_part=True)
    number, number_spec = cut.number()
    own_pairs = pairs.own[0]
    is_cut = cut.halves > 1
    (out,) = backend.pallas(
        functools.partial(
            _body,
            chunks=blocks.chunks,
            size=cut.size,
            v_step=blocks.v_step or width,
            scale=scale,
        ),
        name="kda_gradients" if is_kda else "dplr_gradients",
        grid=cut.grid(batch, heads, count, key_width),
        in_specs=[
            number_spec,
            input_specs(True),
            input_specs(False) if is_cut else None,
            Walks(values, values, values, None if is_kda else values, state, state),
            below_specs,
            jax.tree.map(lambda _: row, own_pairs),
            row if is_kda else None,
        ],
        out_specs=[outputs(rows, rows, cut.lanes_of_part(), cut.columns())],
        out_shape=[shapes],
        fastest_first=FASTEST_FIRST,
        num_warps=blocks.gradients[0],
        num_stages=blocks.gradients[1],
    )(
        number,
        inputs,
        inputs if is_cut else None,
        walks,
        dict.fromkeys(meetings, pairs.below),
        own_pairs,
        beta,
    )
    return out._replace(beta=jnp.sum(out.beta, axis=0)) if is_kda else out
