"""The walk back over the chunks (walk_back.py) for Triton proper.

    dV = Tᵀ (w K dS') + Yᵀ dO     dS <- γ_C dS' + Qᵀ (h dO) − Kᵀ (f dV)

The mirror image of triton_walk.py, whose opening says how blocks arrive: one program takes 64
columns of V of a value head from the last chunk to the first, dSᵀ [v, K] in registers. dO is used
from shared memory as it lies by the product with Y, and scaled from registers by that with Q.
With two stages instead of three, two programs share a multiprocessor; which is better depends on
how many programs there are (blocks.py). Read and written is what walk_back.py reads and writes.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks, find_triton_walk
from kernels_pallas.gated_delta_rule.folding import fold_mapped_axis
from kernels_pallas.gated_delta_rule.kernel_math import Scores
from kernels_pallas.gated_delta_rule.triton_launch import descriptor, key_parts, launch
from kernels_pallas.gated_delta_rule.walk_back import WalkedBack


def _kernel(
    q0, q1, k0, k1, do, t, y, f, h, w, g, last, first, dv, states,
    T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, STORE: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """STORE: write dV and dS. H value heads, G of them a key head. K is K0 + K1 columns."""
    column, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = batch * H + head
    at_k = (head // G) * K
    at_v = head * V + column * BV
    count = T // C

    c, d = tl.arange(0, C), tl.arange(0, BV)
    state = (one.to(tl.int64) * V + column * BV + d)[:, None] * K
    columns0 = tl.arange(0, K0)[None, :]
    s0 = tl.load(last + state + columns0)
    if K1:
        columns1 = K0 + tl.arange(0, K1)[None, :]
        s1 = tl.load(last + state + columns1)

    for step in tl.range(0, count, num_stages=STAGES):
        i = count - 1 - step
        row, own = batch * T + i * C, one * T + i * C
        ka = k0.load([row, at_k])
        if K1:
            kb = k1.load([row, at_k + K0])
        tb, yb = t.load([own, 0]), y.load([own, 0])
        dob = tl.trans(do.load([row, at_v]))
        qa = q0.load([row, at_k])
        if K1:
            qb = q1.load([row, at_k + K0])
        fr, hr, wr = tl.load(f + own + c), tl.load(h + own + c), tl.load(w + own + c)
        gamma = tl.load(g + own + C - 1)

        x0 = s0.to(tl.bfloat16)
        z = tl.dot(x0, tl.trans(ka))
        if K1:
            x1 = s1.to(tl.bfloat16)
            z = tl.dot(x1, tl.trans(kb), z)
        if STORE:
            kept = ((one * count + i).to(tl.int64) * V + column * BV + d)[:, None] * K
            tl.store(states + kept + columns0, x0)
            if K1:
                tl.store(states + kept + columns1, x1)
        z = (z * wr[None, :]).to(tl.bfloat16)
        dvb = tl.dot(z, tb, tl.dot(dob, yb))
        if STORE:
            rows = (row + c).to(tl.int64)[:, None] * (H * V) + at_v + d[None, :]
            tl.store(dv + rows, tl.trans(dvb.to(tl.bfloat16)))
        by_q = (dob.to(tl.float32) * hr[None, :]).to(tl.bfloat16)
        by_k = (dvb * -fr[None, :]).to(tl.bfloat16)
        s0 = tl.dot(by_k, ka, tl.dot(by_q, qa, s0 * gamma))
        if K1:
            s1 = tl.dot(by_k, kb, tl.dot(by_q, qb, s1 * gamma))

    tl.store(first + state + columns0, s0)
    if K1:
        tl.store(first + state + columns1, s1)


KERNEL = triton.jit(inspect.unwrap(_kernel))


def walk_back(
    q: jax.Array,
    k: jax.Array,
    do: jax.Array,
    scores: Scores,
    from_start: jax.Array,
    last: jax.Array,
    *,
    store: bool,
    blocks: Blocks,
) -> WalkedBack:
    """Walks back over the chunks; takes what `walk_back.walk_back` takes on a GPU, for bfloat16.

    Args:
      q: queries [B, T, H, K] bfloat16, T a multiple of 64, K 64, 96 or 128.
      k: keys, likewise.
      do: gradient of o [B, T, HV, V] bfloat16, V a multiple of 64.
      scores: of all chunks.
      from_start: γ [B, HV, N, C] float32.
      last: gradient of the transposed state after the last chunk [B, HV, V, K] float32.
      store: return dV and dS as well.
      blocks: not used: blocks.py has a table of Triton's own.

    Returns:
      The gradients; dV has `do`'s shape and dtype.
    """
    key_heads = k.shape[2]
    parts = key_parts(k.shape[-1])
    first, second = parts["K0"], parts["K1"] or parts["K0"]

    @fold_mapped_axis
    def call(q: Any, k: Any, do: Any, scores: Scores, from_start: Any, last: Any) -> WalkedBack:
        batch, heads, count, _ = from_start.shape
        width, key_width = last.shape[2:]
        tile = find_triton_walk("walk back" if store else "walk back final", batch * heads, width)
        kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), k.dtype)
        none = jax.ShapeDtypeStruct((1,), k.dtype)
        dinitial, dv, states = launch(
            KERNEL,
            (
                *(descriptor(x, 2, (CHUNK, n)) for x in (q, k) for n in (first, second)),
                descriptor(do, 2, (CHUNK, tile.columns)),
                descriptor(scores.inverse, 3, (CHUNK, CHUNK)),
                descriptor(scores.scores, 3, (CHUNK, CHUNK)),
                *scores[2:],
                from_start,
                last,
            ),
            out_type=[
                jax.ShapeDtypeStruct(last.shape, jnp.float32),
                jax.ShapeDtypeStruct(do.shape, do.dtype) if store else none,
                kept if store else none,
            ],
            grid=(width // tile.columns, heads, batch),
            name=f"gated_delta_walk_back{'' if store else '_final'}_triton",
            tile=tile,
            T=count * CHUNK,
            H=heads,
            G=heads // key_heads,
            V=width,
            C=CHUNK,
            STORE=int(store),
            **parts,
        )
        return WalkedBack(dinitial, dv, states) if store else WalkedBack(dinitial)

    return call(q, k, do, scores, from_start, last)
