"""The fused kernels on a GPU (Triton): the product and the convolution of one tile of rows.

Equations: kernel_math.py. One program takes 128 tokens and 64 channels with their 4 taps. It sums
h w2 over R in steps of 64 into a [128, 256] accumulator, the most that a multiprocessor's
registers hold, with both operands streamed through shared memory (48 KB a step, 3 steps in
flight); the columns are ordered tap by tap within the tile, so that splitting the accumulator
into its taps moves nothing. Rows of u before the tile are read from memory again (they are in the
cache), so tiles need nothing from each other.

Programs that run together share rows: channels are the fastest grid axis, so h and u come from
memory once and w2 (9 MB) stays in the L2 cache.

Bytes, bfloat16, a token and channel: forward reads u, writes v (4), and 2·R a token of h;
backward reads u and dv, writes du and W dtaps (6 + 2·W). Products: 2·R·W a token and channel in
each. At R = 384 both are bound by the product.

du needs rows after a token. The backward kernel's tiles overlap by W-1 rows and each writes the
rows it sees whole; parts are shifted within a tile as products with 0/1 matrices, since Triton
cannot move rows of a value. Sums over T (db2) are left as one row a tile, so no result depends on
the order in which programs run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from kernels_pallas import backend
from kernels_pallas.dynamic_conv.blocks import Blocks
from kernels_pallas.dynamic_conv.kernel_math import (
    convolve,
    make_taps,
    silu,
    silu_gradient,
    source_gradients,
    tap_gradients,
)


def forward(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w: Float[Array, "R N"],
    b: Float[Array, " N"],
    seen: Int32[Array, "B T"] | None,
    *,
    width: int,
    blocks: Blocks,
) -> Float[Array, "B T D"]:
    """Runs the forward kernel.

    Args:
      u: values; T is at least `blocks.rows`.
      h: hidden activation of the generator.
      w: its weight, N = taps·D columns ordered by channel tile, tap, channel.
      b: its bias, ordered alike.
      seen: rows before each token that are its own, -1 for padding; None is all from row 0 on.
      width: taps, a power of two.
      blocks: the tile.

    Returns:
      v.
    """
    length = u.shape[1]
    arrays = (h, w, b, u) if seen is None else (h, w, b, u, seen)
    return backend.pallas(
        functools.partial(_forward, width=width, blocks=blocks),
        name="dynamic_conv_forward",
        grid=(u.shape[2] // blocks.channels, pl.cdiv(length, blocks.rows), u.shape[0]),
        in_specs=_specs(arrays),
        out_specs=_row_of(u),
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )(*arrays)


def backward(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w: Float[Array, "R N"],
    b: Float[Array, " N"],
    dv: Float[Array, "B T D"],
    seen: Int32[Array, "B T"] | None,
    *,
    width: int,
    blocks: Blocks,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"], Float[Array, "B S N"]]:
    """Runs the backward kernel; arguments as for `forward`, dv the gradient of v.

    Returns:
      du; dtaps, ordered as w's columns, in u's dtype; and float32 db2 as partial sums.
    """
    batch, length, channels = u.shape
    rows, columns = blocks.rows, b.shape[0]
    tiles = pl.cdiv(length - rows, rows - (width - 1)) + 1
    arrays = (h, w, b, u, dv) if seen is None else (h, w, b, u, dv, seen)
    out_shape = (
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct((batch, length, columns), u.dtype),
        jax.ShapeDtypeStruct((batch, tiles, columns), jnp.float32),
    )
    return backend.pallas(
        functools.partial(_backward, width=width, blocks=blocks, tiles=tiles),
        name="dynamic_conv_backward",
        grid=(channels // blocks.channels, tiles, batch),
        in_specs=_specs(arrays),
        out_specs=tuple(_row_of(x) for x in out_shape),
        out_shape=out_shape,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )(*arrays)


def _row_of(x) -> pl.BlockSpec:
    """One row of the batch, all of it: programs take their own part."""
    return pl.BlockSpec((None, *x.shape[1:]), lambda d, t, i: (i, *(0,) * (len(x.shape) - 1)))


def _specs(arrays) -> list[pl.BlockSpec]:
    """h, w, b, u and what follows: all but w and b have a batch axis."""
    whole = [pl.BlockSpec(x.shape, lambda d, t, i, n=x.ndim: (0,) * n) for x in arrays[1:3]]
    return [_row_of(arrays[0]), *whole, *map(_row_of, arrays[3:])]


def _taps_and_sources(h_ref, w_ref, b_ref, u_ref, seen, start, width, blocks):
    """Returns the tile's taps, the rows of u that they meet, and which of them are own."""
    rows, channels, depth, _, _ = blocks
    tile = pl.program_id(0)
    columns = width * channels

    def add(i, total):
        left = h_ref[pl.ds(start, rows), pl.ds(i * depth, depth)]
        right = w_ref[pl.ds(i * depth, depth), pl.ds(tile * columns, columns)]
        return total + backend.matmul(left, right)

    zeros = jnp.zeros((rows, columns), jnp.float32)
    total = jax.lax.fori_loop(0, h_ref.shape[1] // depth, add, zeros)
    products = jnp.split(total, width, axis=1)
    biases = [b_ref[pl.ds(tile * columns + j * channels, channels)][None, :] for j in range(width)]
    taps = make_taps(products, biases, u_ref.dtype)
    index = start + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    count = index if seen is None else seen
    owns, sources = [], []
    for back in reversed(range(width)):
        at = jnp.maximum(index - back, 0)
        source = u_ref[at, pl.ds(tile * channels, channels)]
        own = (count >= back)[:, None]
        owns.append(own)
        sources.append(jnp.where(own, source, jnp.zeros((), source.dtype)))
    return taps, sources, owns


def _forward(h_ref, w_ref, b_ref, u_ref, *refs, width, blocks):
    (*seen_ref, v_ref) = refs
    rows, channels = blocks.rows, blocks.channels
    # The last tile is moved back to end at T; what it computes twice comes out the same twice.
    start = jnp.minimum(pl.program_id(1) * rows, u_ref.shape[0] - rows)
    seen = seen_ref[0][pl.ds(start, rows)] if seen_ref else None
    taps, sources, _ = _taps_and_sources(h_ref, w_ref, b_ref, u_ref, seen, start, width, blocks)
    v = silu(convolve(taps, sources))
    v_ref[pl.ds(start, rows), pl.ds(pl.program_id(0) * channels, channels)] = v.astype(v_ref.dtype)


def _backward(h_ref, w_ref, b_ref, u_ref, dv_ref, *refs, width, blocks, tiles):
    (*seen_ref, du_ref, dtaps_ref, db_ref) = refs
    rows, channels = blocks.rows, blocks.channels
    tile, number = pl.program_id(0), pl.program_id(1)
    step = rows - (width - 1)
    start = jnp.minimum(number * step, u_ref.shape[0] - rows)
    seen = seen_ref[0][pl.ds(start, rows)] if seen_ref else None
    taps, sources, owns = _taps_and_sources(h_ref, w_ref, b_ref, u_ref, seen, start, width, blocks)
    at = (pl.ds(start, rows), pl.ds(tile * channels, channels))
    dy = silu_gradient(convolve(taps, sources), dv_ref[at])

    # Every row is written by one program: the last that sees the W-1 rows after it.
    index = start + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    is_written = (index >= number * step) & ((index < (number + 1) * step) | (number == tiles - 1))
    is_written = is_written[:, None]
    for j, dtaps in enumerate(tap_gradients(dy, sources)):
        columns = pl.ds(tile * width * channels + j * channels, channels)
        place = dtaps_ref.at[pl.ds(start, rows), columns]
        pltriton.store(place, dtaps.astype(dtaps_ref.dtype), mask=is_written)
        db_ref[number, columns] = jnp.sum(jnp.where(is_written, dtaps, 0.0), axis=0)

    # Rows before row 0 have no own source either, but their parts fall outside the tile.
    parts = source_gradients(dy, taps, owns if seen_ref else [None] * width)
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    du = parts[-1]
    for j, part in enumerate(parts[:-1]):
        shift = (column - row == width - 1 - j).astype(u_ref.dtype)
        du += backend.matmul(shift, part.astype(u_ref.dtype))
    pltriton.store(du_ref.at[at], du.astype(du_ref.dtype), mask=is_written)
