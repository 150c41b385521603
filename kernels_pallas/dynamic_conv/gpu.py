"""The fused kernels on a GPU (Triton): the product and the convolution of one tile of rows.

Equations: kernel_math.py. A tile is 128 tokens and 64 channels with their 4 taps. Its product,
h w2 over R in steps of 64, is a [128, 256] accumulator, the most that a multiprocessor's registers
hold; both operands stream through shared memory (48 KB a step). The columns are ordered tap by tap
within the tile, so that splitting the accumulator into its taps moves nothing. Rows of u before
the tile are read from memory again (they are in the cache), so tiles need nothing from each other.

A program walks over many tiles in one loop of all their steps, and finishes a tile inside it: so
the loads of the next tile's operands are under way while the convolution is worked out. R is only
six steps long; a program a tile would wait for its first loads and leave memory idle at its end.
Programs that run together take neighbouring tiles, channels first: h and u come from memory once
and w2 (9 MB) stays in the L2 cache.

Bytes, bfloat16, a token and channel: forward reads u, writes v (4), and 2·R a token of h;
backward reads u and dv, writes du and W dtaps (6 + 2·W). Products: 2·R·W a token and channel in
each. From the L2 cache: 48 KB for every 4.2 MFLOP.

du needs rows after a token. The backward kernel's tiles overlap by W-1 rows and each writes the
rows it sees whole. Triton cannot move rows of a value; but it can split a value in halves, so a
tile holds its even rows before its odd ones: half of all shifts are then a matter of names, the
rest one row up within a half, a product with a 0/1 matrix. Sums over T (db2) are left as one row
a tile, so no result depends on the order in which programs run.
"""

import functools
from typing import NamedTuple

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
    source_gradient,
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
      h: hidden activation of the generator; R is a multiple of `blocks.depth`.
      w: its weight, N = taps·D columns ordered by channel tile, tap, channel.
      b: its bias, ordered alike.
      seen: rows before each token that are its own, -1 for padding; None is all from row 0 on.
      width: taps, a power of two.
      blocks: the tile.

    Returns:
      v.
    """
    grid = _Grid.of(u, pl.cdiv(u.shape[1], blocks.rows), blocks.rows, width, blocks)
    out_shape = jax.ShapeDtypeStruct((u.shape[0] * u.shape[1], u.shape[2]), u.dtype)
    return _call(_forward, grid, w, b, (h, u), seen, out_shape).reshape(u.shape)


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
) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"], Float[Array, "S N"]]:
    """Runs the backward kernel; arguments as for `forward`, dv the gradient of v.

    Returns:
      du; dtaps, ordered as w's columns, in u's dtype; and float32 db2 as partial sums.
    """
    batch, length, channels = u.shape
    step = blocks.rows - (width - 1)
    grid = _Grid.of(u, pl.cdiv(length - blocks.rows, step) + 1, step, width, blocks)
    out_shape = (
        jax.ShapeDtypeStruct((batch * length, channels), u.dtype),
        jax.ShapeDtypeStruct((batch * length, b.shape[0]), u.dtype),
        jax.ShapeDtypeStruct((batch * grid.tiles, b.shape[0]), jnp.float32),
    )
    du, dtaps, db = _call(_backward, grid, w, b, (h, u, dv), seen, out_shape)
    return du.reshape(u.shape), dtaps.reshape(batch, length, -1), db


class _Grid(NamedTuple):
    """Where the tiles lie.

    Attributes:
      rows: batch.
      length: tokens a row.
      tiles: tiles along a row.
      step: tokens from one tile to the next.
      parts: tiles along the channels.
      width: taps.
      blocks: the tile.
    """

    rows: int
    length: int
    tiles: int
    step: int
    parts: int
    width: int
    blocks: Blocks

    @classmethod
    def of(cls, u, tiles, step, width, blocks) -> "_Grid":
        """The grid for an input [B, T, D]."""
        parts = u.shape[2] // blocks.channels
        return cls(u.shape[0], u.shape[1], tiles, step, parts, width, blocks)


class _Tile(NamedTuple):
    """One tile: number along its row, among all rows' tiles, and of its channels; its tokens.

    Attributes:
      number: along the row.
      overall: among the tiles of all rows.
      part: of the channels.
      index: its tokens' indices in the row, [rows].
      offset: of the row in arrays of all rows.
    """

    number: jax.Array
    overall: jax.Array
    part: jax.Array
    index: jax.Array
    offset: jax.Array


def _call(finish, grid, w, b, arrays, seen, out_shape):
    """Runs `finish` on every tile's taps; the rows of the batch lie behind each other."""
    blocks = grid.blocks
    arrays = arrays if seen is None else (*arrays, seen)
    arrays = (w, b, *(x.reshape(-1, *x.shape[2:]) for x in arrays))
    programs = min(blocks.programs, grid.rows * grid.tiles * grid.parts)

    def whole(x):
        return pl.BlockSpec(x.shape, lambda _: (0,) * len(x.shape))

    return backend.pallas(
        functools.partial(_walk, finish=finish, grid=grid, programs=programs),
        name="dynamic_conv" + finish.__name__,
        grid=(programs,),
        in_specs=[whole(x) for x in arrays],
        out_specs=jax.tree.map(whole, out_shape),
        out_shape=out_shape,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )(*arrays)


def _walk(w_ref, b_ref, h_ref, u_ref, *refs, finish, grid, programs):
    """Multiplies step by step through all tiles of this program; finishes each after its last."""
    rows, channels, depth = grid.blocks[:3]
    columns = grid.width * channels
    steps = h_ref.shape[1] // depth
    program = pl.program_id(0)
    number = grid.rows * grid.tiles * grid.parts

    def tile_at(count):
        overall, part = jax.lax.div(count, grid.parts), jax.lax.rem(count, grid.parts)
        row, number = jax.lax.div(overall, grid.tiles), jax.lax.rem(overall, grid.tiles)
        # The last tile is moved back to end at T.
        start = jnp.minimum(number * grid.step, grid.length - rows)
        return _Tile(number, overall, part, start + _places(rows), row * grid.length)

    def end(total, count):
        tile = tile_at(count)
        bias = b_ref[pl.ds(tile.part * columns, columns)].astype(jnp.float32)
        taps = round_taps(jnp.split(total + bias[None, :], grid.width, axis=1), u_ref.dtype)
        finish(taps, tile, grid, u_ref, *refs)
        return jnp.zeros_like(total)

    def add(_, carry):
        total, count, k = carry
        tile = tile_at(count)
        left = h_ref[tile.offset + tile.index, pl.ds(k * depth, depth)]
        right = w_ref[pl.ds(k * depth, depth), pl.ds(tile.part * columns, columns)]
        total += backend.matmul(left, right)
        is_last = k == steps - 1
        total = jax.lax.cond(is_last, end, lambda total, _: total, total, count)
        return total, jnp.where(is_last, count + programs, count), jnp.where(is_last, 0, k + 1)

    mine = jax.lax.div(number - program + (programs - 1), programs)
    carry = (jnp.zeros((rows, columns), jnp.float32), program, jnp.int32(0))
    jax.lax.fori_loop(0, mine * steps, add, carry)


def _places(rows):
    """A tile's tokens in the order in which it holds them: the even ones, then the odd ones."""
    half = rows // 2
    place = jax.lax.broadcasted_iota(jnp.int32, (rows,), 0)
    return 2 * (place & (half - 1)) + jnp.where(place >= half, 1, 0)


def _sources(u_ref, seen_ref, tile, grid):
    """Returns functions of a tap: the rows of u that it meets, and whether they are own."""
    channels = pl.ds(tile.part * grid.blocks.channels, grid.blocks.channels)
    count = seen_ref[0][tile.offset + tile.index] if seen_ref else tile.index

    def own(j):
        return (count >= grid.width - 1 - j)[:, None]

    def source(j):
        at = jnp.maximum(tile.offset + tile.index - (grid.width - 1 - j), 0)
        return u_ref[at, channels]

    return source, own


def _forward(taps, tile, grid, u_ref, *refs):
    """Writes v of a tile. Rows of two tiles come out the same twice."""
    (*seen_ref, v_ref) = refs
    source, own = _sources(u_ref, seen_ref, tile, grid)
    each = range(grid.width)
    v = silu(convolve(taps, map(source, each), [own(j) for j in each]))
    channels = pl.ds(tile.part * grid.blocks.channels, grid.blocks.channels)
    v_ref[tile.offset + tile.index, channels] = v.astype(v_ref.dtype)


def _backward(taps, tile, grid, u_ref, dv_ref, *refs):
    """Writes du, dtaps and the sums of dtaps of a tile."""
    (*seen_ref, du_ref, dtaps_ref, db_ref) = refs
    width, size = grid.width, grid.blocks.channels
    source, own = _sources(u_ref, seen_ref, tile, grid)
    dv = dv_ref[tile.offset + tile.index, pl.ds(tile.part * size, size)]
    owns = [own(j) for j in range(width)]
    dy = silu_gradient(convolve(taps, map(source, range(width)), owns), dv)

    def is_written(index):
        """Every row is written by one tile: the last that sees the W-1 rows after it."""
        first, is_last = tile.number * grid.step, tile.number == grid.tiles - 1
        return (index >= first) & ((index < first + grid.step) | is_last)

    written = is_written(tile.index)
    for j in range(width):
        # Read again, from the cache: kept, the rows would take the registers of the taps.
        dtaps = tap_gradient(dy, source(j), owns[j])
        first = (tile.part * width + j) * size
        _store(dtaps_ref, tile.offset + tile.index, first, dtaps, written)
        db_ref[tile.overall, pl.ds(first, size)] = jnp.sum(
            jnp.where(written[:, None], dtaps, 0.0), axis=0
        )
    if not seen_ref:  # what reaches back past row 0 falls outside the tile anyway
        owns = [None] * width
    parts = [source_gradient(dy, tap, own) for tap, own in zip(taps, owns, strict=True)]
    start = jnp.minimum(tile.number * grid.step, grid.length - grid.blocks.rows)
    even = start + 2 * jax.lax.broadcasted_iota(jnp.int32, (grid.blocks.rows // 2,), 0)
    for index, du in zip((even, even + 1), _gather(parts, u_ref.dtype), strict=True):
        _store(du_ref, tile.offset + index, tile.part * size, du, is_written(index))


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
