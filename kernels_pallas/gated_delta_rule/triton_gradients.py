"""The gradients of q, k, g and β (gradients.py) for Triton proper.

    X = dO Nᵀ    Z = dV Nᵀ                      then G and J
    dO Sᵀ        dV Sᵀ       N dS'ᵀ             then dQ and dK

(gradient_math.py has the equations.) One program takes one chunk of one value head. Blocks of dO,
dV, N, S and dS' come by the copy engine (TMA) into shared memory and are both operands of their
products there, so registers hold sums alone. 4 warps go over V three times: for the products
between rows, for dQ, for dK. More sums at once would not fit beside a second program on the
multiprocessor, which works while this one waits; 8 warps with all sums at once take half as long
again. <S, dS'> is the trace of one more product: a tensor core has time where registers lack room.
The host makes the descriptors: a program is too short to make its own.

Read: what gradients.py reads, bound by memory like it; all but q, k and dS' twice, from L2 the
second time. Written: the same.
"""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks, find_triton_gradients
from kernels_pallas.gated_delta_rule.folding import fold_mapped_axis
from kernels_pallas.gated_delta_rule.gates import GateRows
from kernels_pallas.gated_delta_rule.gradients import Outputs, finish
from kernels_pallas.gated_delta_rule.inputs import L2_EPS
from kernels_pallas.gated_delta_rule.triton_launch import descriptor, key_parts, launch


def _kernel(
    q0, q1, k0, k1, n, dv, do, s0, s1, ds0, ds1, coarse, fine, beta, start, end,
    dq, dk, by_beta, own, pairs, from_start, to_write, inner,
    T, scale,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, L2: tl.constexpr, EPS: tl.constexpr, BV: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """H value heads, G of them a key head. K is K0 + K1 columns. L2: rows are normalised."""
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = batch * T + chunk * C
    at_k = (head // G) * K
    at_v = head * V
    at_s = ((batch * H + head) * (T // C) + chunk) * V
    gates = (batch * H + head).to(tl.int64) * T + chunk * C + tl.arange(0, C)
    STEPS: tl.constexpr = V // BV

    x = tl.zeros([C, C], tl.float32)
    z = tl.zeros([C, C], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        at = at_v + step * BV
        nb = tl.trans(n.load([row, at]))
        x = tl.dot(do.load([row, at]), nb, x)
        z = tl.dot(dv.load([row, at]), nb, z)

    # The products between rows.
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    qa, ka = q0.load([row, at_k]), k0.load([row, at_k])
    gram = tl.dot(ka, tl.trans(ka))
    if K1:
        qb, kb = q1.load([row, at_k + K0]), k1.load([row, at_k + K0])
        gram = tl.dot(kb, tl.trans(kb), gram)
    big, small, strength = tl.load(coarse + gates), tl.load(fine + gates), tl.load(beta + gates)
    log = (big[:, None] - big[None, :]) + (small[:, None] - small[None, :])
    decay = tl.exp(tl.where(i >= j, log, float("-inf")))
    m = tl.full([C], 1.0, tl.float32)
    r = m
    if L2:
        squares = tl.dot(qa, tl.trans(qa))
        if K1:
            squares = tl.dot(qb, tl.trans(qb), squares)
        m = tl.rsqrt(tl.sum(tl.where(i == j, squares, 0.0), 1) + EPS)
        r = tl.rsqrt(tl.sum(tl.where(i == j, gram, 0.0), 1) + EPS)
        decay *= tl.rsqrt(tl.sum(tl.where(i == j, gram, 0.0), 0) + EPS)[None, :]
    tl.store(own + gates, tl.sum(tl.where(i == j, z, 0.0), 1))
    z = tl.where(i > j, z, 0.0) * (decay * r[:, None])
    by_gram = (z * -strength[None, :]).to(tl.bfloat16)
    z *= gram
    cross = tl.dot(qa, tl.trans(ka))
    if K1:
        cross = tl.dot(qb, tl.trans(kb), cross)
    x = x * (decay * (m * scale)[:, None])
    by_scores = (x * strength[None, :]).to(tl.bfloat16)
    x = x * cross - z
    tl.store(by_beta + gates, tl.sum(x, 0))
    x = tl.where(i > j, x, 0.0) * strength[None, :]
    tl.store(pairs + gates, tl.sum(x, 1) - tl.sum(x, 0))

    # dQ.
    gamma = tl.load(start + gates)
    out = (row + tl.arange(0, C)).to(tl.int64)[:, None] * (H * K) + head * K
    out_a = out + tl.arange(0, K0)[None, :]
    a0 = tl.zeros([C, K0], tl.float32)
    if K1:
        out_b = out + K0 + tl.arange(0, K1)[None, :]
        a1 = tl.zeros([C, K1], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        dob, at = do.load([row, at_v + step * BV]), at_s + step * BV
        a0 = tl.dot(dob, s0.load([at, 0]), a0)
        if K1:
            a1 = tl.dot(dob, s1.load([at, K0]), a1)
    h = (gamma * m * scale)[:, None]
    qa, ka = q0.load([row, at_k]), k0.load([row, at_k])
    a0 *= h
    along = tl.sum(a0 * qa.to(tl.float32), 1)
    a0 = tl.dot(by_scores, ka, a0)
    if K1:
        qb, kb = q1.load([row, at_k + K0]), k1.load([row, at_k + K0])
        a1 *= h
        along += tl.sum(a1 * qb.to(tl.float32), 1)
        a1 = tl.dot(by_scores, kb, a1)
    if L2:
        back = tl.sum(a0 * qa.to(tl.float32), 1)
        if K1:
            back += tl.sum(a1 * qb.to(tl.float32), 1)
        back = (m * m * back)[:, None]
        a0 -= back * qa.to(tl.float32)
        if K1:
            a1 -= back * qb.to(tl.float32)
    tl.store(dq + out_a, a0.to(dq.dtype.element_ty))
    if K1:
        tl.store(dq + out_b, a1.to(dq.dtype.element_ty))

    # dK; and <S, dS'> is the trace of one more product.
    b0 = tl.zeros([C, K0], tl.float32)
    c0 = tl.zeros([C, K0], tl.float32)
    both = tl.zeros([BV, BV], tl.float32)
    if K1:
        b1 = tl.zeros([C, K1], tl.float32)
        c1 = tl.zeros([C, K1], tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        dvb, nb = dv.load([row, at_v + step * BV]), n.load([row, at_v + step * BV])
        at = at_s + step * BV
        sa, dsa = s0.load([at, 0]), ds0.load([at, 0])
        b0 = tl.dot(dvb, sa, b0)
        c0 = tl.dot(nb, dsa, c0)
        both = tl.dot(sa, tl.trans(dsa), both)
        if K1:
            sb, dsb = s1.load([at, K0]), ds1.load([at, K0])
            b1 = tl.dot(dvb, sb, b1)
            c1 = tl.dot(nb, dsb, c1)
            both = tl.dot(sb, tl.trans(dsb), both)
    vi, vj = tl.arange(0, BV)[:, None], tl.arange(0, BV)[None, :]
    chunks = (batch * H + head).to(tl.int64) * (T // C) + chunk
    tl.store(inner + chunks, tl.sum(tl.sum(tl.where(vi == vj, both, 0.0), 1), 0))
    f, w = (gamma * r)[:, None], (tl.load(end + gates) * r)[:, None]
    qa, ka = q0.load([row, at_k]), k0.load([row, at_k])
    b0, c0 = b0 * f, c0 * w
    along -= tl.sum(b0 * ka.to(tl.float32), 1)
    written = tl.sum(c0 * ka.to(tl.float32), 1)
    c0 = tl.dot(tl.trans(by_scores), qa, strength[:, None] * c0 - b0)
    c0 = tl.dot(by_gram, ka, tl.dot(tl.trans(by_gram), ka, c0))
    if K1:
        qb, kb = q1.load([row, at_k + K0]), k1.load([row, at_k + K0])
        b1, c1 = b1 * f, c1 * w
        along -= tl.sum(b1 * kb.to(tl.float32), 1)
        written += tl.sum(c1 * kb.to(tl.float32), 1)
        c1 = tl.dot(tl.trans(by_scores), qb, strength[:, None] * c1 - b1)
        c1 = tl.dot(by_gram, kb, tl.dot(tl.trans(by_gram), kb, c1))
    tl.store(from_start + gates, along)
    tl.store(to_write + gates, written)
    if L2:
        back = tl.sum(c0 * ka.to(tl.float32), 1)
        if K1:
            back += tl.sum(c1 * kb.to(tl.float32), 1)
        back = (r * r * back)[:, None]
        c0 -= back * ka.to(tl.float32)
        if K1:
            c1 -= back * kb.to(tl.float32)
    tl.store(dk + out_a, c0.to(dk.dtype.element_ty))
    if K1:
        tl.store(dk + out_b, c1.to(dk.dtype.element_ty))


KERNEL = triton.jit(inspect.unwrap(_kernel))


def gradients(
    q: jax.Array,
    k: jax.Array,
    gates: GateRows,
    news: jax.Array,
    dv: jax.Array,
    do: jax.Array,
    states: jax.Array,
    dstates: jax.Array,
    *,
    blocks: Blocks,
    scale: float,
    use_qk_l2norm: bool,
    dtype: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the gradients of q, k, g and β; takes what `gradients.gradients` takes on a GPU.

    Args:
      q: queries [B, T, H, K] bfloat16, T a multiple of 64, K 64, 96 or 128.
      k: keys, likewise.
      gates: the gates [B, HV, N, C] float32.
      news: N [B, T, HV, V] bfloat16, V a multiple of 64.
      dv: gradient of v, likewise.
      do: gradient of o, likewise.
      states: transposed states before each chunk [B, HV, N, V, K] bfloat16.
      dstates: gradients of the transposed states after each chunk, likewise.
      blocks: not used: blocks.py has a table of Triton's own.
      scale: factor on the queries.
      use_qk_l2norm: whether rows were normalised.
      dtype: of the gradients of q and k.

    Returns:
      dq and dk for each value head [B, T, HV, K], and dg and dβ [B, HV, N, C] float32.
    """
    key_heads = q.shape[2]
    parts = key_parts(k.shape[-1])
    first, second = parts["K0"], parts["K1"] or parts["K0"]
    tile = find_triton_gradients(k.shape[-1])

    @fold_mapped_axis
    def call(q, k, gates, news, dv, do, states, dstates):
        batch, heads, count, _ = gates.beta.shape
        key_width, width = q.shape[-1], states.shape[3]
        rows = jax.ShapeDtypeStruct((batch, count * CHUNK, heads, key_width), dtype)
        factor = jax.ShapeDtypeStruct(gates.beta.shape, jnp.float32)
        keys = [descriptor(x, 2, (CHUNK, n)) for x in (q, k) for n in (first, second)]
        values = [descriptor(x, 2, (CHUNK, tile.columns)) for x in (news, dv, do)]
        kept = [
            descriptor(x, 4, (tile.columns, n)) for x in (states, dstates) for n in (first, second)
        ]
        return launch(
            KERNEL,
            (*keys, *values, *kept, *gates),
            out_type=Outputs(
                rows,
                rows,
                factor,
                factor,
                factor,
                factor,
                factor,
                factor.update(shape=(batch, heads, count, 1)),
            ),
            grid=(heads, count, batch),
            name="gated_delta_gradients_triton",
            tile=tile,
            T=count * CHUNK,
            scale=scale,
            H=heads,
            G=heads // key_heads,
            V=width,
            C=CHUNK,
            L2=int(use_qk_l2norm),
            EPS=L2_EPS,
            **parts,
        )

    return finish(gates, call(q, k, gates, news, dv, do, states, dstates))
