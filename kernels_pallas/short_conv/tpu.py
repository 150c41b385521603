"""The kernels on a TPU (Mosaic): one tile of rows and channels in VMEM.

Equations: kernel_math.py. One program takes 512 tokens (backward: 256) and 512 channels. The rows
of u before the tile are the last 16 of the block before it, a second view of u; shifts along the
rows are slices of the joined value.

Backward, the grid walks along T from the end: what the first rows of a tile add to du before them
is kept in an output block that stays in VMEM, and completes du of the tile before. dw and db are
summed in a block that stays alike.

Bytes moved: as in gpu.py, and 16 rows of u a tile again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32

from kernels_pallas import backend
from kernels_pallas.dynamic_conv.tpu import HALO, KEPT, seen_rows, to_column
from kernels_pallas.short_conv.blocks import Blocks
from kernels_pallas.short_conv.kernel_math import activate, activation_gradient, convolve, only


def forward(
    u: Float[Array, "B T D"],
    weights: Float[Array, "N D"],
    seen: Int32[Array, "B T"] | None,
    *,
    width: int,
    activation: str | None,
    blocks: Blocks,
) -> Float[Array, "B T D"]:
    """Runs the forward kernel; arguments and result as in gpu.py."""
    batch, length, channels = u.shape
    tiles = pl.cdiv(length, blocks.rows)
    arrays, specs = _inputs(u, weights, (), seen, tiles, blocks, lambda t: t)
    return backend.pallas(
        functools.partial(_forward, width=width, activation=activation),
        name="short_conv_forward",
        grid=(batch, channels // blocks.channels, tiles),
        in_specs=specs,
        out_specs=specs[1],
        out_shape=jax.ShapeDtypeStruct(u.shape, u.dtype),
    )(*arrays)


def backward(
    u: Float[Array, "B T D"],
    weights: Float[Array, "N D"],
    dy: Float[Array, "B T D"],
    seen: Int32[Array, "B T"] | None,
    *,
    width: int,
    activation: str | None,
    blocks: Blocks,
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 N D"]]:
    """Runs the backward kernel; arguments and results as in gpu.py."""
    batch, length, channels = u.shape
    rows, part = blocks.rows, blocks.channels
    tiles, number = pl.cdiv(length, rows), len(weights)
    arrays, specs = _inputs(u, weights, (dy,), seen, tiles, blocks, lambda t: tiles - 1 - t)
    du, dw, _ = backend.pallas(
        functools.partial(
            _backward, width=width, activation=activation, length=length, tiles=tiles
        ),
        name="short_conv_backward",
        grid=(batch, channels // part, tiles),
        sequential=1,
        in_specs=specs,
        out_specs=(
            specs[1],
            pl.BlockSpec((None, None, number, part), lambda i, d, t: (i, 0, 0, d)),
            pl.BlockSpec((None, width - 1, KEPT, part), lambda i, d, t: (i, 0, 0, d)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct(u.shape, u.dtype),
            jax.ShapeDtypeStruct((batch, 1, number, channels), jnp.float32),
            jax.ShapeDtypeStruct((batch, width - 1, KEPT, channels), jnp.float32),
        ),
    )(*arrays)
    return du, dw


def _inputs(u, weights, more, seen, tiles, blocks, place):
    """Weights, u, u's rows before, `more` like u, seen; `place` maps grid step to tile."""
    rows, part = blocks.rows, blocks.channels
    step = rows // HALO
    tile = pl.BlockSpec((None, rows, part), lambda i, d, t: (i, place(t), d))
    halo = pl.BlockSpec(
        (None, HALO, part), lambda i, d, t: (i, jnp.maximum(place(t) * step - 1, 0), d)
    )
    arrays = [weights, u, u, *more]
    specs = [pl.BlockSpec((len(weights), part), lambda i, d, t: (0, d)), tile, halo]
    specs += [tile] * len(more)
    if seen is not None:
        arrays.append(seen_rows(seen, tiles, rows))
        specs.append(pl.BlockSpec((None, None, 1, rows), lambda i, d, t: (i, place(t), 0, 0)))
    return arrays, specs


def _weights_and_sources(w_ref, u_ref, halo_ref, seen_ref, number, width):
    """Returns weights [1, channels] and, oldest first, sources and whether they are own."""
    rows = u_ref.shape[0]
    every = w_ref[...].astype(jnp.float32)
    weights = [every[n : n + 1] for n in range(len(every))]
    seen = to_column(seen_ref[0][...]) if seen_ref else None
    halo = jnp.where(number == 0, 0.0, halo_ref[...].astype(jnp.float32))
    joined = jnp.concatenate([halo, u_ref[...].astype(jnp.float32)], axis=0)
    backs = list(reversed(range(width)))
    owns = [None if seen is None else seen >= back for back in backs]
    sources = [joined[HALO - back : HALO - back + rows] for back in backs]
    return weights, [only(own, x) for own, x in zip(owns, sources, strict=True)], owns


def _forward(w_ref, u_ref, halo_ref, *refs, width, activation):
    (*seen_ref, y_ref) = refs
    weights, sources, owns = _weights_and_sources(
        w_ref, u_ref, halo_ref, seen_ref, pl.program_id(2), width
    )
    y = activate(convolve(weights, sources), activation)
    y_ref[...] = only(owns[-1], y).astype(y_ref.dtype)  # padding has a bias


def _backward(w_ref, u_ref, halo_ref, dy_ref, *refs, width, activation, length, tiles):
    (*seen_ref, du_ref, dw_ref, kept_ref) = refs
    rows = u_ref.shape[0]
    is_first = pl.program_id(2) == 0  # the last tile of the row
    number = tiles - 1 - pl.program_id(2)
    weights, sources, owns = _weights_and_sources(w_ref, u_ref, halo_ref, seen_ref, number, width)
    dx = only(owns[-1], activation_gradient(convolve(weights, sources), dy_ref[...], activation))
    if length % rows:  # past the end of T lies anything, NaN included
        index = number * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        dx = only(index < length, dx)
        sources = [only(index < length, x) for x in sources]
    terms = [dx * x for x in sources] + [dx] * (len(weights) - width)
    for n, x in enumerate(terms):
        before = jnp.where(is_first, 0.0, dw_ref[n : n + 1])
        dw_ref[n : n + 1] = before + jnp.sum(x, axis=0, keepdims=True)
    du = dx * weights[width - 1]
    for j in range(width - 1):
        part = only(owns[j], dx * weights[j])
        after = jnp.where(is_first, 0.0, kept_ref[j])
        back = width - 1 - j
        du += jnp.concatenate([part, after], axis=0)[back : back + rows]
        kept_ref[j] = part[:KEPT]
    du_ref[...] = du.astype(du_ref.dtype)
