"""One token of linear attention in one kernel: the state is read once and written in place.

With γ = e^g, one number a head or one a key channel, and both outputs taken of the state as it
comes in, so that nothing waits for the new one:

    o = scale (Sᵀ (γ ∘ q) + (q·k) v)        S' = γ ∘ S + k vᵀ

The state is all the traffic, 2·K·V values a head; q, k, v, o and g are less than two per cent of
it. Everything small happens here too, since decoding is bound by launches where it is not bound by
the state: on a GPU the whole step is this one launch.

GPU: a program takes `v_block` columns of one head's state, [K, v_block], in registers, in tiles of
K whose height is a power of two (192 = 12 · 16); columns of V do not depend on each other. Where
`v_block` does not divide V, the last block is masked.

TPU: a program takes whole states of several heads of one sequence into VMEM, about a megabyte, so
that copies in and out overlap with arithmetic. Rows lie along lanes there and are turned into
columns with a mask. Operands get a unit axis for the (8, 128) tiles first.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import StepBlocks, find_step_blocks
from kernels_pallas.gated_delta_rule.kernel_math import add_up
from kernels_pallas.step_state import (
    check_step_supported,
    heads_a_program,
    inside_mask,
    shape_of,
)


def step_values(
    tiles: Sequence[jax.Array],
    q: Sequence[jax.Array],
    k: Sequence[jax.Array],
    v: jax.Array,
    gamma: Sequence[jax.Array | float],
    scale: float,
) -> tuple[list[jax.Array], jax.Array]:
    """The equations above for some columns of one head, on values.

    Args:
      tiles: the state's rows [K, V] in equal parts, float32.
      q: queries as columns [K, 1] in the same parts, float32.
      k: keys, likewise.
      v: value row [1, V], float32.
      gamma: decay of every part, a scalar, [1, 1] or a column.
      scale: factor on the queries.

    Returns:
      The new state in the same parts, and o [1, V].
    """
    parts = list(zip(tiles, q, k, gamma, strict=True))
    read = jnp.sum(add_up(s * (x * decay) for s, x, _, decay in parts), axis=0)[None, :]
    overlap = jnp.sum(add_up(x * y for _, x, y, _ in parts), axis=0)[None, :]
    return [decay * s + y * v for s, _, y, decay in parts], scale * (read + overlap * v)


def _gpu_body(q_ref, k_ref, v_ref, *refs, part: int, width: int, scale: float):
    """One block of columns of one head's state."""
    g_ref, (s_ref, o_ref, new_ref) = refs[0] if len(refs) == 4 else None, refs[-3:]
    v_block = s_ref.shape[1]
    inside = functools.partial(inside_mask, start=pl.program_id(2) * v_block, width=width)
    parts = [pl.ds(i, part) for i in range(0, k_ref.shape[0], part)]
    tiles = [
        pltriton.load(s_ref.at[p, :], mask=inside((part, v_block))).astype(jnp.float32)
        for p in parts
    ]
    q, k = ([ref[p].astype(jnp.float32)[:, None] for p in parts] for ref in (q_ref, k_ref))
    if g_ref is None:
        gamma = [1.0] * len(parts)
    elif g_ref.shape:
        gamma = [jnp.exp(g_ref[p].astype(jnp.float32))[:, None] for p in parts]
    else:
        gamma = [jnp.exp(g_ref[...].astype(jnp.float32))] * len(parts)
    v = pltriton.load(v_ref, mask=inside((v_block,))).astype(jnp.float32)[None, :]
    new_tiles, o = step_values(tiles, q, k, v, gamma, scale)
    for p, tile in zip(parts, new_tiles, strict=True):
        tile = tile.astype(new_ref.dtype)
        pltriton.store(new_ref.at[p, :], tile, mask=inside(tile.shape))
    o = jnp.sum(o, axis=0).astype(o_ref.dtype)
    pltriton.store(o_ref, o, mask=inside(o.shape))


def _tpu_body(q_ref, k_ref, v_ref, *refs, repeats: int, has_channels: bool, scale: float):
    """Whole states of several heads of one sequence, one after another."""
    g_ref, (s_ref, o_ref, new_ref) = refs[0] if len(refs) == 4 else None, refs[-3:]
    heads, width = s_ref.shape[0], k_ref.shape[-1]
    rows, columns = (jax.lax.broadcasted_iota(jnp.int32, (width, width), i) for i in (0, 1))

    def column(row):
        return jnp.sum(jnp.where(rows == columns, row, 0.0), axis=1, keepdims=True)

    def decay(i) -> Any:
        if g_ref is None:
            return 1.0
        if has_channels:
            return column(jnp.exp(g_ref[i].astype(jnp.float32)))
        head = pl.program_id(1) * heads + i
        at = jax.lax.broadcasted_iota(jnp.int32, g_ref.shape, 1) == head
        g = jnp.where(at, g_ref[...].astype(jnp.float32), 0.0)
        return jnp.exp(jnp.sum(g, axis=1, keepdims=True))

    for i in range(heads):
        q, k = (column(ref[i // repeats].astype(jnp.float32)) for ref in (q_ref, k_ref))
        v, tile = v_ref[i].astype(jnp.float32), s_ref[i].astype(jnp.float32)
        (tile,), o = step_values([tile], [q], [k], v, [decay(i)], scale)
        new_ref[i] = tile.astype(new_ref.dtype)
        o_ref[i] = o.astype(o_ref.dtype)


def step_pallas(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None,
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    blocks: StepBlocks | None = None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step in one kernel; `blocks` overrides the gated delta step's table of blocks."""
    check_step_supported(q, v, state)
    batch, heads, key_width, width = state.shape
    if blocks is None:
        blocks = find_step_blocks(batch * heads, key_width, width, state.dtype)
    factor = key_width**-0.5 if scale is None else float(scale)
    call = _on_tpu if backend.platform() == "tpu" else _on_gpu
    return call(q, k, v, g, state, blocks, factor)


def _on_gpu(q, k, v, g, state, blocks: StepBlocks, scale: float):
    batch, heads, key_width, width = state.shape
    repeats = heads // q.shape[1]
    v_block = blocks.v_block

    def shared(b, h, c):
        return (b, h if repeats == 1 else jax.lax.div(h, repeats), 0)

    row = pl.BlockSpec((None, None, v_block), lambda b, h, c: (b, h, c))
    tile = pl.BlockSpec((None, None, key_width, v_block), lambda b, h, c: (b, h, 0, c))
    wide = pl.BlockSpec((None, None, key_width), shared)
    decays = []
    if g is not None and g.ndim == 2:
        decays = [pl.BlockSpec((None, None), lambda b, h, c: (b, h))]
    elif g is not None:
        decays = [pl.BlockSpec((None, None, key_width), lambda b, h, c: (b, h, 0))]
    part = min(key_width & -key_width, blocks.part)
    o, new_state = backend.pallas(
        functools.partial(_gpu_body, part=part, width=width, scale=scale),
        name="linear_attention_step",
        grid=(batch, heads, pl.cdiv(width, v_block)),
        in_specs=[wide, wide, row, *decays, tile],
        out_specs=[row, tile],
        out_shape=[shape_of(v), shape_of(state)],
        num_warps=blocks.warps,
        aliases={3 + len(decays): 1},
    )(q, k, v, *([] if g is None else [g]), state)
    return o, new_state


def _on_tpu(q, k, v, g, state, blocks: StepBlocks, scale: float):
    batch, heads, key_width, width = state.shape
    repeats = heads // q.shape[1]
    taken = heads_a_program(state, repeats, blocks.head_bytes)
    shared = max(taken // repeats, 1)

    def q_head(b, h):
        return (b, h if taken >= repeats else jax.lax.div(h * taken, repeats), 0, 0)

    def own(*shape):
        return pl.BlockSpec((None, taken, *shape), lambda b, h: (b, h, 0, 0))

    wide = pl.BlockSpec((None, shared, 1, key_width), q_head)
    has_channels, decays, specs = False, [], []
    if g is not None and g.ndim == 3:
        has_channels, decays, specs = True, [g[:, :, None]], [own(1, key_width)]
    elif g is not None:
        decays, specs = [g[:, None]], [pl.BlockSpec((None, 1, heads), lambda b, h: (b, 0, 0))]
    o, new_state = backend.pallas(
        functools.partial(
            _tpu_body, repeats=min(repeats, taken), has_channels=has_channels, scale=scale
        ),
        name="linear_attention_step",
        grid=(batch, heads // taken),
        in_specs=[wide, wide, own(1, width), *specs, own(key_width, width)],
        out_specs=[own(1, width), own(key_width, width)],
        out_shape=[jax.ShapeDtypeStruct((batch, heads, 1, width), v.dtype), shape_of(state)],
        aliases={3 + len(decays): 1},
    )(q[:, :, None], k[:, :, None], v[:, :, None], *decays, state)
    return o[:, :, 0], new_state
