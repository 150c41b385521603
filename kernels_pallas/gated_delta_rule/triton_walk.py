"""The walk over the chunks (walk.py) for Triton proper, which a Hopper GPU runs faster.

    E = V − f (K S)     N = T E     O = h (Q S) + Y E     S <- γ_C S + Kᵀ (w N)

(kernel_math.py has the notation.) As in the Pallas kernel, one program takes some columns of V of
one value head through all chunks and holds Sᵀ [v, K] in registers. What differs is how blocks
arrive: one thread asks the copy engine (TMA) for a block of k, q, v, T or Y, which lands in shared
memory two chunks ahead and is an operand of a product as it lies there. A chunk takes 48 KB, so
three stages fill a multiprocessor with one program; whether 64 columns or 128 with twice the warps
is better depends on how many programs there are (blocks.py). K = 96 is a block of 64 columns and
one of 32, since blocks are powers of two. Read and written is what walk.py reads and writes.

The host makes the descriptors. Where programs made them (Triton 3.7.1), in memory lent by XLA, the
rule's results differed from run to run.
Imported only where it runs (drivers.py): it needs the packages of the extra `triton`.
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
from kernels_pallas.gated_delta_rule.walk import Walked

KINDS = ("output", "states", "final", "homogeneous")


def _kernel(
    q0, q1, k0, k1, v, t, y, f, h, w, g, first, last, o, news, states,
    T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, KIND: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """KIND: index in KINDS. H value heads, G of them a key head. K is K0 + K1 columns."""
    column, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = batch * H + head
    at_k = (head // G) * K
    at_v = head * V + column * BV
    count = T // C

    c, d = tl.arange(0, C), tl.arange(0, BV)
    state = (one.to(tl.int64) * V + column * BV + d)[:, None] * K
    columns0 = tl.arange(0, K0)[None, :]
    s0 = tl.load(first + state + columns0)
    if K1:
        columns1 = K0 + tl.arange(0, K1)[None, :]
        s1 = tl.load(first + state + columns1)

    for i in tl.range(0, count, num_stages=STAGES):
        row, own = batch * T + i * C, one * T + i * C
        ka = k0.load([row, at_k])
        if K1:
            kb = k1.load([row, at_k + K0])
        if KIND != 3:
            vb = v.load([row, at_v])
        tb = t.load([own, 0])
        fr, wr, gamma = tl.load(f + own + c), tl.load(w + own + c), tl.load(g + own + C - 1)

        x0 = s0.to(tl.bfloat16)
        read = tl.dot(x0, tl.trans(ka))
        if K1:
            x1 = s1.to(tl.bfloat16)
            read = tl.dot(x1, tl.trans(kb), read)
        error = -read * fr[None, :]
        if KIND != 3:
            error += tl.trans(vb).to(tl.float32)
        error = error.to(tl.bfloat16)
        n = tl.dot(error, tl.trans(tb))
        rows = (row + c).to(tl.int64)[:, None] * (H * V) + at_v + d[None, :]
        if KIND == 0:
            out = tl.dot(x0, tl.trans(q0.load([row, at_k])))
            if K1:
                out = tl.dot(x1, tl.trans(q1.load([row, at_k + K0])), out)
            yb, hr = y.load([own, 0]), tl.load(h + own + c)
            out = tl.dot(error, tl.trans(yb), out * hr[None, :])
            tl.store(o + rows, tl.trans(out.to(tl.bfloat16)))
        if KIND == 1:
            tl.store(news + rows, tl.trans(n.to(tl.bfloat16)))
            kept = ((one * count + i).to(tl.int64) * V + column * BV + d)[:, None] * K
            tl.store(states + kept + columns0, x0)
            if K1:
                tl.store(states + kept + columns1, x1)
        written = (n * wr[None, :]).to(tl.bfloat16)
        s0 = tl.dot(written, ka, s0 * gamma)
        if K1:
            s1 = tl.dot(written, kb, s1 * gamma)

    tl.store(last + state + columns0, s0)
    if K1:
        tl.store(last + state + columns1, s1)


# Unwrapped, since a type checker's import hook may have wrapped it.
KERNEL = triton.jit(inspect.unwrap(_kernel))


def walk(
    kind: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: Scores,
    from_start: jax.Array,
    initial: jax.Array,
    *,
    blocks: Blocks,
) -> Walked:
    """Walks over the chunks; takes what `walk.walk` takes on a GPU, for bfloat16.

    Args:
      kind: one of `KINDS`.
      q: queries [B, T, H, K] bfloat16, T a multiple of 64, K 64, 96 or 128.
      k: keys, likewise.
      v: values [B, T, HV, V] bfloat16, V a multiple of 64.
      scores: of all chunks.
      from_start: γ [B, HV, N, C] float32.
      initial: transposed state before the first chunk [B, HV, V, K] float32.
      blocks: not used: blocks.py has a table of Triton's own.

    Returns:
      What `kind` asks for.
    """
    key_heads = k.shape[2]
    parts = key_parts(k.shape[-1])
    first, second = parts["K0"], parts["K1"] or parts["K0"]

    @fold_mapped_axis
    def call(q: Any, k: Any, v: Any, scores: Scores, from_start: Any, initial: Any) -> Walked:
        batch, heads, count, _ = from_start.shape
        width, key_width = initial.shape[2:]
        tile = find_triton_walk(f"walk {kind}", batch * heads, width)
        # An output that the kind does not ask for is one value that nobody writes.
        rows = jax.ShapeDtypeStruct((batch, count * CHUNK, heads, width), k.dtype)
        kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), k.dtype)
        none = jax.ShapeDtypeStruct((1,), k.dtype)
        last, o, news, states = launch(
            KERNEL,
            (
                *(descriptor(x, 2, (CHUNK, n)) for x in (q, k) for n in (first, second)),
                descriptor(v, 2, (CHUNK, tile.columns)),
                descriptor(scores.inverse, 3, (CHUNK, CHUNK)),
                descriptor(scores.scores, 3, (CHUNK, CHUNK)),
                *scores[2:],
                from_start,
                initial,
            ),
            out_type=[
                jax.ShapeDtypeStruct(initial.shape, jnp.float32),
                rows if kind == "output" else none,
                rows if kind == "states" else none,
                kept if kind == "states" else none,
            ],
            grid=(width // tile.columns, heads, batch),
            name=f"gated_delta_walk_{kind}_triton",
            tile=tile,
            T=count * CHUNK,
            H=heads,
            G=heads // key_heads,
            V=width,
            C=CHUNK,
            KIND=KINDS.index(kind),
            **parts,
        )
        walked = Walked(last)
        if kind == "output":
            walked = walked._replace(o=o)
        if kind == "states":
            walked = walked._replace(news=news, states=states)
        return walked

    return call(q, k, v, scores, from_start, initial)
