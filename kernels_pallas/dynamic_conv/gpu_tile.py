"""What a GPU kernel does with one tile once its taps are known (see gpu.py; equations there).

Everything here happens on values of one tap's size in registers. Rows of u are read, from the
cache, once for every tap that meets them.

du needs rows after a token. The backward kernel's tiles overlap by W-1 rows and each writes the
rows it sees whole. Triton cannot move rows of a value; but it can split a value in halves, so a
tile holds its even rows before its odd ones: half of all shifts are then a matter of names, the
rest one row up within a half, a product with a 0/1 matrix. Sums over T (db2) are left as one row
a tile, so no result depends on the order in which programs run.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas import backend
from kernels_pallas.dynamic_conv.blocks import Blocks
from kernels_pallas.dynamic_conv.kernel_math import (
    convolve,
    silu,
    silu_gradient,
    source_gradient,
    tap_gradient,
)


class Grid(NamedTuple):
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
    def of(cls, u, tiles, step, width, blocks) -> "Grid":
        """The grid for an input [B, T, D]."""
        parts = u.shape[2] // blocks.channels
        return cls(u.shape[0], u.shape[1], tiles, step, parts, width, blocks)


class Tile(NamedTuple):
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


def finish_forward(taps, tile, grid, u_ref, *refs):
    """Writes v of a tile. Rows of two tiles come out the same twice."""
    (*seen_ref, v_ref) = refs
    source, own = _sources(u_ref, seen_ref, tile, grid)
    each = range(grid.width)
    v = silu(convolve(taps, map(source, each), [own(j) for j in each]))
    channels = pl.ds(tile.part * grid.blocks.channels, grid.blocks.channels)
    v_ref[tile.offset + tile.index, channels] = v.astype(v_ref.dtype)


def finish_backward(taps, tile, grid, u_ref, dv_ref, *refs):
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
