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
    round_taps,
    silu,
    silu_gradient,
    source_gradients,
    tap_gradient,
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


def _make_taps(h_ref, w_ref, b_ref, index, width, blocks, dtype):
    """Returns the taps of rows `index`."""
    depth, columns = blocks.depth, width * blocks.channels
    first = pl.program_id(0) * columns

    def add(i, total):
        left = h_ref[index, pl.ds(i * depth, depth)]
        right = w_ref[pl.ds(i * depth, depth), pl.ds(first, columns)]
        return total + backend.matmul(left, right)

    bias = b_ref[pl.ds(first, columns)].astype(jnp.float32)
    start = jnp.broadcast_to(bias[None, :], (index.shape[0], columns))
    total = jax.lax.fori_loop(0, h_ref.shape[1] // depth, add, start)
    return round_taps(jnp.split(total, width, axis=1), dtype)


def _source(u_ref, index, own, back, channels):
    """Returns the rows of u that lie `back` before `index`, 0 where they are not own."""
    x = u_ref[jnp.maximum(index - back, 0), channels]
    return jnp.where(own, x, jnp.zeros((), x.dtype))


def _own(index, seen_ref, width):
    """For each tap whether the row it meets is the token's own, [rows, 1]."""
    count = seen_ref[0][index] if seen_ref else index
    return [(count >= back)[:, None] for back in reversed(range(width))]


def _forward(h_ref, w_ref, b_ref, u_ref, *refs, width, blocks):
    (*seen_ref, v_ref) = refs
    rows = blocks.rows
    channels = pl.ds(pl.program_id(0) * blocks.channels, blocks.channels)
    # The last tile is moved back to end at T; what it computes twice comes out the same twice.
    start = jnp.minimum(pl.program_id(1) * rows, u_ref.shape[0] - rows)
    index = start + jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    taps = _make_taps(h_ref, w_ref, b_ref, index, width, blocks, u_ref.dtype)
    owns = _own(index, seen_ref, width)
    backs = reversed(range(width))
    sources = [_source(u_ref, index, own, k, channels) for own, k in zip(owns, backs, strict=True)]
    v_ref[index, channels] = silu(convolve(taps, sources)).astype(v_ref.dtype)


def _backward(h_ref, w_ref, b_ref, u_ref, dv_ref, *refs, width, blocks, tiles):
    (*seen_ref, du_ref, dtaps_ref, db_ref) = refs
    rows, half = blocks.rows, blocks.rows // 2
    tile, number = pl.program_id(0), pl.program_id(1)
    channels = pl.ds(tile * blocks.channels, blocks.channels)
    step = rows - (width - 1)
    start = jnp.minimum(number * step, u_ref.shape[0] - rows)
    place = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    index = start + 2 * (place & (half - 1)) + jnp.where(place >= half, 1, 0)
    taps = _make_taps(h_ref, w_ref, b_ref, index, width, blocks, u_ref.dtype)
    owns = _own(index, seen_ref, width)
    backs = list(reversed(range(width)))

    def source(j):
        return _source(u_ref, index, owns[j], backs[j], channels)

    dy = silu_gradient(convolve(taps, map(source, range(width))), dv_ref[index, channels])

    def is_written(index):
        """Every row is written by one program: the last that sees the W-1 rows after it."""
        first = number * step
        return (index >= first) & ((index < first + step) | (number == tiles - 1))

    written = is_written(index)
    for j in range(width):
        # Read again, from the cache: kept, the rows would take the registers of the taps.
        dtaps = tap_gradient(dy, source(j))
        first = (tile * width + j) * blocks.channels
        _store(dtaps_ref, index, first, dtaps, written)
        total = jnp.sum(jnp.where(written[:, None], dtaps, 0.0), axis=0)
        db_ref[number, pl.ds(first, blocks.channels)] = total

    # Rows before row 0 are not own either, but their parts fall outside the tile.
    parts = source_gradients(dy, taps, owns if seen_ref else [None] * width)
    even = start + 2 * jax.lax.broadcasted_iota(jnp.int32, (half,), 0)
    for offset, du in enumerate(_gather(parts, u_ref.dtype)):
        rows_of = even + offset
        _store(du_ref, rows_of, tile * blocks.channels, du, is_written(rows_of))


def _store(ref, index, first, x, written):
    """Stores the rows of x that are `written`, at column `first`."""
    column = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    place = ref.at[jnp.broadcast_to(index[:, None], x.shape), column]
    pltriton.store(place, x.astype(ref.dtype), mask=jnp.broadcast_to(written[:, None], x.shape))


def _gather(parts, dtype):
    """Sums parts_j[s + (W-1) - j] for the tile's even rows s, then for its odd ones.

    With even rows e and odd rows o of the part of the tap that reaches k back, and S one place up:

        row 2p:     e_0 + o_1 + S (e_2 + o_3 + S (...))
        row 2p + 1: o_0 + S (e_1 + o_2 + S (e_3 + ...))
    """
    even, odd = zip(*(jnp.split(x, 2, axis=0) for x in reversed(parts)), strict=True)  # by k
    half, width = even[0].shape[0], len(parts)
    row = jax.lax.broadcasted_iota(jnp.int32, (half, half), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (half, half), 1)
    up = (column - row == 1).astype(dtype)

    def horner(terms):
        total = terms[-1]
        for term in reversed(terms[:-1]):
            total = term + backend.matmul(up, total.astype(dtype))
        return total

    pairs = range(0, width, 2)
    of_even = horner([even[k] + odd[k + 1] for k in pairs])
    of_odd = horner([odd[0], *(even[k - 1] + odd[k] for k in pairs[1:]), even[width - 1]])
    return of_even, of_odd
