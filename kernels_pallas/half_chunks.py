"""Block specs of the kernels that take half a chunk's rows and some columns of K at a time.

Those are the gradient kernels of decays per key channel, with much to hold for every row. On a GPU
a program takes one half and `part` columns: in a loop over parts, what does not depend on the
columns (masks, gradients of scores) would be kept in registers from one to the next, and overflow
them. A TPU program takes whole rows of several chunks.

The grid is (B, HV, chunks, halves, parts). Where rows of one half meet those of the other, arrays
come twice, once as `own`, once as the other half's.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.layout import Layout

FASTEST_FIRST = (4, 3, 1, 2, 0)  # parts and halves of a chunk share its arrays in the L2 cache


@dataclasses.dataclass(frozen=True)
class HalfChunks:
    """How chunks are cut.

    Attributes:
      chunk: C.
      chunks: chunks a program (GPU: 1).
      part: columns of K a program.
      group: value heads that share a query and key head.
    """

    chunk: int
    chunks: int
    part: int
    group: int = 1

    def __post_init__(self) -> None:
        assert self.chunks == 1 or self.halves == 1, "halves are of one chunk"

    @property
    def halves(self) -> int:
        """Parts that a chunk's rows are cut into: 2, or 1 on a TPU."""
        return 1 if backend.platform() == "tpu" else 2

    @property
    def size(self) -> int:
        """Rows of a chunk that a program takes."""
        return self.chunk // self.halves

    def grid(self, batch: int, heads: int, count: int, key_width: int) -> tuple[int, ...]:
        """The grid for `count` chunks."""
        return batch, heads, count // self.chunks, self.halves, key_width // self.part

    def _half(self, half: Any, own: bool) -> Any:
        return half if own else 1 - half

    def rows(
        self, width: int, *, own: bool = True, is_part: bool = False, value_head: bool = True
    ) -> pl.BlockSpec:
        """Rows in the kernels' layout (`layout.Layout.rows`), `width` columns or a part of K."""
        layout = Layout(self.group, lambda c, half, p: c * self.halves + self._half(half, own))
        column = (lambda c, half, p: p) if is_part else None
        width = self.part if is_part else width
        return layout.rows(self.chunks * self.size, width, value_head=value_head, column=column)

    def lanes(self, *, own: bool = True) -> pl.BlockSpec:
        """Numbers of rows, [B, HV, N, C]."""
        return pl.BlockSpec(
            (None, None, self.chunks, self.size),
            lambda b, h, c, half, p: (b, h, c, self._half(half, own)),
        )

    def lanes_of_part(self) -> pl.BlockSpec:
        """Numbers of rows and parts, [parts, B, HV, N, C]."""
        return pl.BlockSpec(
            (None, None, None, self.chunks, self.size),
            lambda b, h, c, half, p: (p, b, h, c, half),
        )

    def columns(self) -> pl.BlockSpec:
        """Numbers of a half and columns of K, [B, HV, halves N, K]."""
        return pl.BlockSpec(
            (None, None, self.chunks, self.part),
            lambda b, h, c, half, p: (b, h, c * self.halves + half, p),
        )

    def matrix(self, *, reads: bool = True, writes: bool = True) -> pl.BlockSpec:
        """Blocks of matrices [B, HV, T, C] whose rows and columns are the own half or the other."""
        return pl.BlockSpec(
            (None, None, self.chunks * self.size, self.size),
            lambda b, h, c, half, p: (
                b,
                h,
                c * self.halves + self._half(half, reads),
                self._half(half, writes),
            ),
        )

    def state(self, width: int) -> pl.BlockSpec:
        """Parts of transposed states [B, HV, N, V, K]."""
        return pl.BlockSpec(
            (None, None, self.chunks, width, self.part),
            lambda b, h, c, half, p: (b, h, c, 0, p),
        )

    def number(self) -> tuple[jax.Array | None, pl.BlockSpec | None]:
        """The half's number, as an array of one; None where there are no halves."""
        if self.halves == 1:
            return None, None
        return jnp.arange(self.halves), pl.BlockSpec((1,), lambda b, h, c, half, p: (half,))


def with_beyond(dg: jax.Array, beyond: jax.Array | None) -> jax.Array:
    """Adds `vector_decay_gradients.Tile.beyond` to the gradients of log decays.

    Args:
      dg: [B, T, H, K] float32.
      beyond: [B, H, 2 N, K] float32, or None.
    """
    if beyond is None:
        return dg
    batch, length, heads, width = dg.shape
    halves = beyond.shape[2]
    rest = beyond.reshape(batch, heads, halves // 2, 2, width)[:, :, :, ::-1]
    rest = jnp.moveaxis(rest.reshape(beyond.shape), 1, 2)[:, :, None]
    return (dg.reshape(batch, halves, -1, heads, width) + rest).reshape(dg.shape)
