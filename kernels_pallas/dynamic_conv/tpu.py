"""The fused kernels on a TPU (Mosaic): the product and the convolution of one tile of rows.

Equations: kernel_math.py. One program takes 256 tokens and 512 (backward: 256) channels with their
taps, each tap one product with all of R, [256, R] x [R, channels]. w2's tile stays in VMEM while
the grid walks along T. The rows of u before the tile are the last 16 of the block before it, a
second view of u; shifts along the rows are slices of the joined value.

Backward, the grid walks along T from the end: the first rows of a tile's parts are kept in an
output block that stays in VMEM, and complete du of the tile before it. db2 is summed in a block
that stays alike.

Bytes moved and products: as in gpu.py, but h is read once for every channel tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
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

HALO = 16  # rows of the view before a tile: a whole bfloat16 register tile, and W-1 or more
KEPT = 8  # rows of parts handed to the tile before: a whole float32 register tile


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
    """Runs the forward kernel; arguments and result as in gpu.py."""
    batch, length, channels = u.shape
    rows, part = blocks.rows, blocks.channels
    tiles = pl.cdiv(length, rows)
    arrays = [h, w, b[None], u, u]
    if seen is not None:
        arrays.append(seen_rows(seen, tiles, rows))
    return backend.pallas(
        functools.partial(_forward, width=width),
        name="dynamic_conv_forward",
        grid=(batch, channels // part, tiles),
        in_specs=_specs(h, width, blocks, len(arrays), lambda t: t),
        out_specs=pl.BlockSpec((None, rows, part), lambda i, d, t: (i, t, d)),
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
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
) -> tuple[Float[Array, "B T D"], Float[Array, "B T N"], Float[Array, "S N"]]:
    """Runs the backward kernel; arguments and results as in gpu.py."""
    batch, length, channels = u.shape
    rows, part = blocks.rows, blocks.channels
    tiles, columns = pl.cdiv(length, rows), width * part

    def from_end(t):
        return tiles - 1 - t

    arrays = [h, w, b[None], u, u, dv]
    in_specs = _specs(h, width, blocks, 5, from_end)
    in_specs.append(pl.BlockSpec((None, rows, part), lambda i, d, t: (i, from_end(t), d)))
    if seen is not None:
        arrays.append(seen_rows(seen, tiles, rows))
        in_specs += _specs(h, width, blocks, 6, from_end)[5:]
    du, dtaps, db, _ = backend.pallas(
        functools.partial(_backward, width=width, length=length, tiles=tiles),
        name="dynamic_conv_backward",
        grid=(batch, channels // part, tiles),
        sequential=1,
        in_specs=in_specs,
        out_specs=(
            pl.BlockSpec((None, rows, part), lambda i, d, t: (i, from_end(t), d)),
            pl.BlockSpec((None, rows, columns), lambda i, d, t: (i, from_end(t), d)),
            pl.BlockSpec((None, 1, columns), lambda i, d, t: (i, 0, d)),
            pl.BlockSpec((None, width - 1, KEPT, part), lambda i, d, t: (i, 0, 0, d)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct((batch, length, b.shape[0]), u.dtype),
            jax.ShapeDtypeStruct((batch, 1, b.shape[0]), jnp.float32),
            jax.ShapeDtypeStruct((batch, width - 1, KEPT, channels), jnp.float32),
        ),
    )(*arrays)
    return du, dtaps, db[:, 0]


def seen_rows(seen, tiles, rows):
    """Lays the counts out as one row of lanes a tile; float32, since they are moved by sums."""
    batch, length = seen.shape
    padded = jnp.pad(seen, ((0, 0), (0, tiles * rows - length)))
    return padded.astype(jnp.float32).reshape(batch, tiles, 1, rows)


def _specs(h, width, blocks, count, place):
    """The first `count` of h, w, b, u, u's rows before, seen; `place` maps grid step to tile."""
    rows, part = blocks.rows, blocks.channels
    hidden, columns, step = h.shape[2], width * part, rows // HALO
    specs = [
        pl.BlockSpec((None, rows, hidden), lambda i, d, t: (i, place(t), 0)),
        pl.BlockSpec((hidden, columns), lambda i, d, t: (0, d)),
        pl.BlockSpec((1, columns), lambda i, d, t: (0, d)),
        pl.BlockSpec((None, rows, part), lambda i, d, t: (i, place(t), d)),
        pl.BlockSpec(
            (None, HALO, part), lambda i, d, t: (i, jnp.maximum(place(t) * step - 1, 0), d)
        ),
        pl.BlockSpec((None, None, 1, rows), lambda i, d, t: (i, place(t), 0, 0)),
    ]
    return specs[:count]


def _taps_and_sources(h_ref, w_ref, b_ref, u_ref, halo_ref, seen, number, width):
    """As in gpu.py, for tile `number`; float32 sources."""
    rows, part = u_ref.shape
    columns = [slice(j * part, (j + 1) * part) for j in range(width)]
    sums = [backend.matmul(h_ref[...], w_ref[:, c]) + b_ref[:, c] for c in columns]
    taps = round_taps(sums, u_ref.dtype)
    halo = jnp.where(number == 0, 0.0, halo_ref[...].astype(jnp.float32))
    joined = jnp.concatenate([halo, u_ref[...].astype(jnp.float32)], axis=0)
    backs = list(reversed(range(width)))
    sources = [joined[HALO - back : HALO - back + rows] for back in backs]
    return taps, sources, [None if seen is None else seen >= back for back in backs]


def to_column(row):
    """Turns [1, n] into [n, 1], as a masked sum."""
    shape = (row.shape[1], row.shape[1])
    i = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    j = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)


def _forward(h_ref, w_ref, b_ref, u_ref, halo_ref, *refs, width):
    (*seen_ref, v_ref) = refs
    seen = to_column(seen_ref[0][...]) if seen_ref else None
    taps, sources, owns = _taps_and_sources(
        h_ref, w_ref, b_ref, u_ref, halo_ref, seen, pl.program_id(2), width
    )
    v_ref[...] = silu(convolve(taps, sources, owns)).astype(v_ref.dtype)


def _backward(h_ref, w_ref, b_ref, u_ref, halo_ref, dv_ref, *refs, width, length, tiles):
    (*seen_ref, du_ref, dtaps_ref, db_ref, kept_ref) = refs
    rows, part = u_ref.shape
    is_first = pl.program_id(2) == 0  # the last tile of the row
    number = tiles - 1 - pl.program_id(2)
    seen = to_column(seen_ref[0][...]) if seen_ref else None
    taps, sources, owns = _taps_and_sources(
        h_ref, w_ref, b_ref, u_ref, halo_ref, seen, number, width
    )
    dy = silu_gradient(convolve(taps, sources, owns), dv_ref[...])
    dtaps = [tap_gradient(dy, x, own) for x, own in zip(sources, owns, strict=True)]
    parts = [source_gradient(dy, tap, own) for tap, own in zip(taps, owns, strict=True)]
    if length % rows:  # past the end of T lies anything, NaN included
        index = number * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        is_real = index < length
        dtaps = [jnp.where(is_real, x, 0.0) for x in dtaps]
        parts = [jnp.where(is_real, x, 0.0) for x in parts]
    for j, x in enumerate(dtaps):
        columns = slice(j * part, (j + 1) * part)
        dtaps_ref[:, columns] = x.astype(dtaps_ref.dtype)
        before = jnp.where(is_first, 0.0, db_ref[:, columns])
        db_ref[:, columns] = before + jnp.sum(x, axis=0, keepdims=True)
    du = parts[-1]
    for j, x in enumerate(parts[:-1]):
        after = jnp.where(is_first, 0.0, kept_ref[j])
        back = width - 1 - j
        du += jnp.concatenate([x, after], axis=0)[back : back + rows]
        kept_ref[j] = x[:KEPT]
    du_ref[...] = du.astype(du_ref.dtype)
