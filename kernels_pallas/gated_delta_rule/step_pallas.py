"""One token of the gated delta rule in one kernel: the state is read once and written in place.

As in step_math.py, with raw rows q and k, factors m = scale / |q| and r = 1 / |k| (m = scale and
r = 1 without l2-normalisation), γ = e^g, and both products taken of the state as it comes in:

    a = Sᵀk    b = Sᵀq    δ = β (v − γ r a)    S' = γ S + k (r δ)ᵀ    o = m (γ b + r (q·k) δ)

So nothing waits for the new state, nor the products for the norms. The state is all the traffic:
2·K·V values a head (B128 H12 K96 V256 in float32: 302 MB, 101 µs at 3.0 TB/s); q, k, v, o, g and β
are less than one per cent of it. Everything small happens here too, since decoding is bound by
launches where it is not bound by the state: on a GPU the whole step is this one launch.

GPU: a program takes `v_block` columns of one head's state, [K, v_block]; columns of V do not depend
on each other, so nothing is shared. The block is loaded once, stays in registers (48 to 96 of a
thread's, which bounds `v_block`) and is stored over itself. Loads run along V, 16 bytes a thread
and 256 in a row. Where `v_block` does not divide V, the last block is masked. K is cut into equal
tiles whose height is a power of two (96 = 6 · 16), which the Triton compiler asks for; their
products are added up before the one reduction over rows, which crosses warps. Several programs run
beside each other on a multiprocessor and keep loads in flight while others reduce or store. On an
H100 a loop over several states in one program was no faster, and blocks of all 256 columns, which
leave a multiprocessor one program, were slower.

TPU: a program takes whole states of `heads` heads of one sequence into VMEM, about a megabyte, so
that copies in and out overlap with the arithmetic of the program before. Rows lie along lanes there
and are turned into columns with a mask. Operands get a unit axis for the (8, 128) tiles first.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import StepBlocks, find_step_blocks
from kernels_pallas.gated_delta_rule.step_math import row_values, step_values
from kernels_pallas.step_state import (
    check_step_supported,
    heads_a_program,
    inside_mask,
    shape_of,
)


def _gpu_body(
    q_ref, k_ref, v_ref, beta_ref, *refs, part: int, width: int, has_decay: bool, options: dict
):
    """One block of columns of one head's state."""
    g_ref, (s_ref, o_ref, new_ref) = refs[0] if has_decay else None, refs[-3:]
    v_block = s_ref.shape[1]
    inside = functools.partial(inside_mask, start=pl.program_id(2) * v_block, width=width)
    parts = [pl.ds(i, part) for i in range(0, k_ref.shape[0], part)]
    tiles = [
        pltriton.load(s_ref.at[p, :], mask=inside((part, v_block))).astype(jnp.float32)
        for p in parts
    ]
    q, k = ([ref[p].astype(jnp.float32) for p in parts] for ref in (q_ref, k_ref))
    new_tiles, o = step_values(
        tiles,
        [x[:, None] for x in q],
        [x[:, None] for x in k],
        pltriton.load(v_ref, mask=inside((v_block,))).astype(jnp.float32)[None, :],
        1.0 if g_ref is None else jnp.exp(g_ref[...].astype(jnp.float32)),
        beta_ref[...].astype(jnp.float32),
        *row_values(q, k, **options),
    )
    for p, tile in zip(parts, new_tiles, strict=True):
        tile = tile.astype(new_ref.dtype)
        pltriton.store(new_ref.at[p, :], tile, mask=inside(tile.shape))
    o = jnp.sum(o, axis=0).astype(o_ref.dtype)
    pltriton.store(o_ref, o, mask=inside(o.shape))


def _tpu_body(q_ref, k_ref, v_ref, beta_ref, *refs, repeats: int, has_decay: bool, options: dict):
    """Whole states of several heads of one sequence, one after another."""
    g_ref, (s_ref, o_ref, new_ref) = refs[0] if has_decay else None, refs[-3:]
    heads, width = s_ref.shape[0], k_ref.shape[-1]
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (width, width), i) for i in (0, 1))

    def column(row):
        return jnp.sum(jnp.where(rows == columns, row, 0.0), axis=1, keepdims=True)

    def gate(ref, head):
        at = jax.lax.broadcasted_iota(jnp.int32, ref.shape, 1) == head
        return jnp.sum(jnp.where(at, ref[...].astype(jnp.float32), 0.0), axis=1, keepdims=True)

    for i in range(heads):
        head = pl.program_id(1) * heads + i
        q, k = (ref[i // repeats].astype(jnp.float32) for ref in (q_ref, k_ref))
        (tile,), o = step_values(
            [s_ref[i].astype(jnp.float32)],
            [column(q)],
            [column(k)],
            v_ref[i].astype(jnp.float32),
            1.0 if g_ref is None else jnp.exp(gate(g_ref, head)),
            gate(beta_ref, head),
            *row_values([q], [k], **options),
        )
        new_ref[i] = tile.astype(new_ref.dtype)
        o_ref[i] = o.astype(o_ref.dtype)


def step_pallas(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV"] | None,
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
    blocks: StepBlocks | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step in one kernel; `blocks` overrides the table of blocks.py."""
    check_step_supported(q, v, state)
    batch, heads, key_width, width = state.shape
    if blocks is None:
        blocks = find_step_blocks(batch * heads, key_width, width, state.dtype)
    options = {
        "scale": key_width**-0.5 if scale is None else float(scale),
        "use_qk_l2norm": use_qk_l2norm,
    }
    call = _on_tpu if backend.platform() == "tpu" else _on_gpu
    return call(q, k, v, g, beta, state, blocks, options)


def _on_gpu(q, k, v, g, beta, state, blocks: StepBlocks, options):
    batch, heads, key_width, width = state.shape
    repeats = heads // q.shape[1]
    v_block = blocks.v_block
    assert v_block & (v_block - 1) == 0, blocks
    part = min(key_width & -key_width, blocks.part)

    def shared(b, h, c):
        return (b, h if repeats == 1 else jax.lax.div(h, repeats), 0)

    gate = pl.BlockSpec((None, None), lambda b, h, c: (b, h))
    row = pl.BlockSpec((None, None, v_block), lambda b, h, c: (b, h, c))
    tile = pl.BlockSpec((None, None, key_width, v_block), lambda b, h, c: (b, h, 0, c))
    wide = pl.BlockSpec((None, None, key_width), shared)
    gates = (beta,) if g is None else (beta, g)
    body = functools.partial(
        _gpu_body, part=part, width=width, has_decay=g is not None, options=options
    )
    o, new_state = backend.pallas(
        body,
        name="gated_delta_step",
        grid=(batch, heads, pl.cdiv(width, v_block)),
        in_specs=[wide, wide, row, *(gate for _ in gates), tile],
        out_specs=[row, tile],
        out_shape=[jax.ShapeDtypeStruct(v.shape, v.dtype), shape_of(state)],
        num_warps=blocks.warps,
        aliases={3 + len(gates): 1},
    )(q, k, v, *gates, state)
    return o, new_state


def _on_tpu(q, k, v, g, beta, state, blocks: StepBlocks, options):
    batch, heads, key_width, width = state.shape
    repeats = heads // q.shape[1]
    taken = heads_a_program(state, repeats, blocks.head_bytes)
    shared = max(taken // repeats, 1)

    def q_head(b, h):
        return (b, h if taken >= repeats else jax.lax.div(h * taken, repeats), 0, 0)

    gate = pl.BlockSpec((None, 1, heads), lambda b, h: (b, 0, 0))
    row = pl.BlockSpec((None, taken, 1, width), lambda b, h: (b, h, 0, 0))
    tile = pl.BlockSpec((None, taken, key_width, width), lambda b, h: (b, h, 0, 0))
    wide = pl.BlockSpec((None, shared, 1, key_width), q_head)
    gates = (beta,) if g is None else (beta, g)
    body = functools.partial(
        _tpu_body, repeats=min(repeats, taken), has_decay=g is not None, options=options
    )
    o, new_state = backend.pallas(
        body,
        name="gated_delta_step",
        grid=(batch, heads // taken),
        in_specs=[wide, wide, row, *(gate for _ in gates), tile],
        out_specs=[row, tile],
        out_shape=[jax.ShapeDtypeStruct((batch, heads, 1, width), v.dtype), shape_of(state)],
        aliases={3 + len(gates): 1},
    )(q[:, :, None], k[:, :, None], v[:, :, None], *(x[:, None] for x in gates), state)
    return o[:, :, 0], new_state
