"""The fused kernels on a GPU (Triton): the product and the convolution of one tile of rows.

Equations: kernel_math.py. A tile is 128 tokens and, forward, 64 channels with their 4 taps. Its
product, h w2 over R in steps of 64, is a [128, 256] accumulator, the most that a multiprocessor's
registers hold; both operands stream through shared memory (48 KB a step for 4.2 MFLOP). Backward
has more to do per tile after the product: tiles of 32 channels, so that two programs share a
multiprocessor and one multiplies while the other finishes. The columns are ordered tap by tap
within the tile, so that splitting the accumulator into its taps moves nothing. Rows of u before
the tile are read from memory again (they are in the cache), so tiles need nothing from each other.

A program walks over many tiles in one loop of all their steps, and finishes a tile inside it: so
the loads of the next tile's operands are under way while the convolution is worked out. R is only
six steps long; a program a tile would wait for its first loads and leave memory idle at its end.
Programs that run together take neighbouring tiles, channels first: h and u come from memory once
and w2 (9 MB) stays in the L2 cache.

Bytes, bfloat16, a token and channel: forward reads u, writes v (4), and 2·R a token of h;
backward reads u and dv, writes du and W dtaps (6 + 2·W). Products: 2·R·W a token and channel in
each.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from kernels_pallas import backend
from kernels_pallas.dynamic_conv.blocks import Blocks
from kernels_pallas.dynamic_conv.gpu_tile import Grid, Tile, finish_backward, finish_forward
from kernels_pallas.dynamic_conv.kernel_math import round_taps


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
    grid = Grid.of(u, pl.cdiv(u.shape[1], blocks.rows), blocks.rows, width, blocks)
    out_shape = jax.ShapeDtypeStruct((u.shape[0] * u.shape[1], u.shape[2]), u.dtype)
    return _call(finish_forward, grid, w, b, (h, u), seen, out_shape).reshape(u.shape)


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
    grid = Grid.of(u, pl.cdiv(length - blocks.rows, step) + 1, step, width, blocks)
    out_shape = (
        jax.ShapeDtypeStruct((batch * length, channels), u.dtype),
        jax.ShapeDtypeStruct((batch * length, b.shape[0]), u.dtype),
        jax.ShapeDtypeStruct((batch * grid.tiles, b.shape[0]), jnp.float32),
    )
    du, dtaps, db = _call(finish_backward, grid, w, b, (h, u, dv), seen, out_shape)
    return du.reshape(u.shape), dtaps.reshape(batch, length, -1), db


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
        name="dynamic_conv" + finish.__name__.removeprefix("finish"),
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
        return Tile(number, overall, part, start + _places(rows), row * grid.length)

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
