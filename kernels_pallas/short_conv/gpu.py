"""The kernels on a GPU (Triton): a warp walks down a strip of 128 channels, row by row.

Equations: kernel_math.py. A program is one warp with 4 channels a lane. The last W-1 rows of u stay
in its registers and move up by renaming, so every row is read and converted once and nothing
crosses lanes. A few rows are loaded at a time, while those before them are worked on; that, and the
many warps a multiprocessor holds, covers the latency of memory. Backward, the same walk computes
the sum before the activation again, and carries the du of the last W-1 rows, to which later tokens
still add, and the strip's dw and db. The dx of the W-1 rows after the strip complete its last du.

`seen` rises by at most 1 a row, so a row that is cleared for one token stays so while it moves up.

Bytes, bfloat16, a token and channel: forward reads u, writes y (4); backward reads u and dy,
writes du (6). Rows read twice: (W-1)/128 of them forward, 3(W-1)/512 backward; the neighbours run
at the same time, so most come from the L2 cache. dw and db: one float32 row a weight and strip.
Instructions a value (W = 4, SiLU, counted in the compiled loops): 15 forward, 28 backward, 23 and
37 with segments and a bias; of the time that memory takes at least, on an H100, a third to two
thirds. Without `backend.multiply_add` and `backend.sigmoid` it was 29 and 51 (8 channels a lane).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int32

from kernels_pallas import backend
from kernels_pallas.backend import multiply_add
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
    """Runs the forward kernel.

    Args:
      u: values.
      weights: the W taps and perhaps the bias, of u's dtype.
      seen: rows before each token that are its own, -1 for padding; None is all from row 0 on.
      width: W.
      activation: "silu" or None.
      blocks: the tile.

    Returns:
      y.
    """
    body = functools.partial(_forward, width=width, activation=activation, blocks=blocks)
    out_shape = jax.ShapeDtypeStruct(u.shape, u.dtype)
    return _call(body, "short_conv_forward", (u,), weights, seen, blocks, out_shape)


def backward(
    u: Float[Array, "B T D"],
    weights: Float[Array, "N D"],
    dy: Float[Array, "B T D"],
    seen: Int32[Array, "B T"] | None,
    *,
    width: int,
    activation: str | None,
    blocks: Blocks,
) -> tuple[Float[Array, "B T D"], Float[Array, "B S N D"]]:
    """Runs the backward kernel; arguments as for `forward`, dy the gradient of y.

    Returns:
      du, and the weights' gradient as float32 partial sums.
    """
    body = functools.partial(_backward, width=width, activation=activation, blocks=blocks)
    tiles = pl.cdiv(u.shape[1], blocks.rows)
    out_shape = (
        jax.ShapeDtypeStruct(u.shape, u.dtype),
        jax.ShapeDtypeStruct((u.shape[0], tiles, *weights.shape), jnp.float32),
    )
    return _call(body, "short_conv_backward", (u, dy), weights, seen, blocks, out_shape)


def _call(body, name, arrays, weights, seen, blocks, out_shape):
    """Runs a program for every strip; those that start together lie side by side."""
    batch, length, channels = arrays[0].shape
    arrays = (*arrays, *(() if seen is None else (seen,)))

    def of_row(x):
        dims = x.shape[1:]
        return pl.BlockSpec((None, *dims), lambda d, t, i: (i, *(0 for _ in dims)))

    return backend.pallas(
        body,
        name=name,
        grid=(pl.cdiv(channels, blocks.channels), pl.cdiv(length, blocks.rows), batch),
        in_specs=[pl.BlockSpec(weights.shape, lambda *_: (0, 0)), *map(of_row, arrays)],
        out_specs=jax.tree.map(of_row, out_shape),
        out_shape=out_shape,
        num_warps=blocks.warps,
    )(weights, *arrays)


class _Strip:
    """Loads and stores of one strip's rows; those outside the array are 0 or left alone."""

    def __init__(self, u_ref, blocks):
        self.length, self.channels = u_ref.shape
        self.part = pl.ds(pl.program_id(0) * blocks.channels, blocks.channels)
        self.first = pl.program_id(1) * blocks.rows
        column = self.part.start + jax.lax.broadcasted_iota(jnp.int32, (blocks.channels,), 0)
        # Known to be all where the strips divide the channels.
        self.inside = column < self.channels if self.channels % blocks.channels else None

    def mask(self, rule):
        """The mask for a row that is used if `rule`."""
        mask = jnp.broadcast_to(rule, (self.part.size,))
        return mask if self.inside is None else mask & self.inside

    def load(self, ref, row, rule=True):
        """Row `row` if `rule`, 0 where there is none."""
        mask = self.mask(rule & (row >= 0) & (row < self.length))
        return pltriton.load(ref.at[row, self.part], mask=mask, other=0.0)

    def load_weights(self, ref):
        """The weights, each [channels], in float32."""
        other = None if self.inside is None else 0.0
        places = [ref.at[jnp.int32(n), self.part] for n in range(ref.shape[0])]
        found = [pltriton.load(place, mask=self.inside, other=other) for place in places]
        return [x.astype(jnp.float32) for x in found]

    def store(self, ref, row, x, rule=True):
        """Writes row `row` if `rule`."""
        at = ref.at[row, self.part]
        pltriton.store(at, x.astype(ref.dtype), mask=self.mask(rule & (row < self.length)))

    def before(self, ref, width):
        """The W-1 rows before the strip, oldest first, in float32."""
        return [self.load(ref, self.first - k).astype(jnp.float32) for k in range(width - 1, 0, -1)]

    def count(self, seen_ref, row):
        """How many rows before `row` are its own; None if all that there are."""
        return seen_ref[0][jnp.minimum(row, self.length - 1)] if seen_ref else None


def _owns(count, width):
    """Whether the row that each tap meets is the token's own, oldest first."""
    return [None if count is None else count >= back for back in range(width - 1, -1, -1)]


def _sources(past, row, owns):
    rows = [*past, row.astype(jnp.float32)]
    return [only(own, x) for own, x in zip(owns, rows, strict=True)]


def _forward(w_ref, u_ref, *refs, width, activation, blocks):
    (*seen_ref, y_ref) = refs
    strip, together = _Strip(u_ref, blocks), blocks.at_once
    weights = strip.load_weights(w_ref)
    end = strip.first + blocks.rows

    def load(number):
        index = [strip.first + number * together + n for n in range(together)]
        return [strip.load(u_ref, t, t < end) for t in index]

    def step(number, carry):
        rows, past = carry
        after = load(number + 1)
        for n, row in enumerate(rows):
            t = strip.first + number * together + n
            owns = _owns(strip.count(seen_ref, t), width)
            sources = _sources(past, row, owns)
            y = activate(convolve(weights, sources), activation)
            strip.store(y_ref, t, only(owns[-1], y))  # padding has a bias
            past = sources[1:]
        return after, past

    jax.lax.fori_loop(0, blocks.rows // together, step, (load(0), strip.before(u_ref, width)))


def _backward(w_ref, u_ref, dy_ref, *refs, width, activation, blocks):
    (*seen_ref, du_ref, dw_ref) = refs
    strip, together = _Strip(u_ref, blocks), blocks.at_once
    weights = strip.load_weights(w_ref)
    zero = jnp.zeros((blocks.channels,), jnp.float32)

    def load(number):
        index = [strip.first + number * together + n for n in range(together)]
        return [(strip.load(u_ref, t), strip.load(dy_ref, t)) for t in index]

    def walk(start, rows, past, pending, sums):
        """Walks down `rows` from `start`; `pending` has du so far of the W-1 rows before."""
        for n, (row, dy) in enumerate(rows):
            t = start + n
            owns = _owns(strip.count(seen_ref, t), width)
            sources = _sources(past, row, owns)
            dx = only(owns[-1], activation_gradient(convolve(weights, sources), dy, activation))
            pending = [
                only(own, multiply_add(dx, tap, x), x)
                for own, tap, x in zip(owns[:-1], weights[: width - 1], pending, strict=True)
            ]
            pending.append(dx * weights[width - 1])
            done = t - (width - 1)
            strip.store(du_ref, done, pending[0], done >= strip.first)
            past, pending = sources[1:], pending[1:]
            if sums:
                of_bias = [x + dx for x in sums[width:]]
                sums = [multiply_add(dx, *pair) for pair in zip(sources, sums, strict=False)]
                sums += of_bias
        return past, pending, sums

    def step(number, carry):
        rows, *rest = carry
        after = load(number + 1)
        return after, *walk(strip.first + number * together, rows, *rest)

    steps = blocks.rows // together
    carry = load(0), strip.before(u_ref, width), [zero] * (width - 1), [zero] * len(weights)
    rows, past, pending, sums = jax.lax.fori_loop(0, steps, step, carry)
    # What comes after the strip counts for its last rows, but not in its sums.
    walk(strip.first + blocks.rows, rows[: width - 1], past, pending, [])
    for n, x in enumerate(sums):
        place = dw_ref.at[pl.program_id(1), jnp.int32(n), strip.part]
        pltriton.store(place, x, mask=strip.inside)
