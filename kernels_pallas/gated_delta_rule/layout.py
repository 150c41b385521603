"""Where the kernels find their blocks: the one difference between a GPU and a TPU.

A GPU reads rows [B, T, H, ·] as they are. A TPU wants time and width last, [B, H, T, ·]. Both see
the same blocks: `C · chunks` rows of one head. A GPU's rows come in column parts of a power of two,
a TPU's whole.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kernels_pallas import backend


def column_parts(width: int) -> tuple[slice, ...]:
    """Cuts `width` columns into powers of two for Triton; Mosaic takes them whole."""
    if backend.platform() == "tpu":
        return (slice(0, width),)
    parts, start = [], 0
    while start < width:
        size = min(1 << ((width - start).bit_length() - 1), 128)
        parts.append(slice(start, start + size))
        start += size
    return tuple(parts)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Block specs of one kernel call, whose grid starts with batch row and value head.

    Attributes:
      group: value heads that share a query and key head.
      at: from the rest of the grid's indices to the index of a block of rows.
    """

    group: int
    at: Callable[..., Any]

    def _head(self, h: Any, per_value_head: bool) -> Any:
        return h if per_value_head or self.group == 1 else jax.lax.div(h, self.group)

    def rows(
        self, length: int, width: int, *, value_head: bool = True, column: Callable | None = None
    ) -> pl.BlockSpec:
        """Rows [B, T, H, ·] (GPU) or [B, H, T, ·] (TPU)."""

        def index(b, h, *rest):
            h, t = self._head(h, value_head), self.at(*rest)
            c = 0 if column is None else column(*rest)
            return (b, h, t, c) if backend.platform() == "tpu" else (b, t, h, c)

        if backend.platform() == "tpu":
            return pl.BlockSpec((None, None, length, width), index)
        return pl.BlockSpec((None, length, None, width), index)

    def per_chunk(self, *shape: int, column: Callable | None = None) -> pl.BlockSpec:
        """Blocks of [B, HV, N, ·, ...], or of [B, HV, T, C] matrices."""

        def index(b, h, *rest):
            tail = [0] * (len(shape) - 1)
            if column is not None:
                tail[0] = column(*rest)
            return (b, h, self.at(*rest), *tail)

        return pl.BlockSpec((None, None, *shape), index)

    @staticmethod
    def state(width: int, key_width: int, column: Callable) -> pl.BlockSpec:
        """Blocks of transposed states [B, HV, V, K]."""
        return pl.BlockSpec((None, None, width, key_width), lambda b, h, *r: (b, h, column(*r), 0))


def for_kernel(x: jax.Array) -> jax.Array:
    """Brings rows [B, T, H, ·] into the kernels' layout (and back)."""
    return jnp.swapaxes(x, 1, 2) if backend.platform() == "tpu" else x


def row_shape(batch: int, length: int, heads: int, width: int, dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of rows in the kernels' layout."""
    if backend.platform() == "tpu":
        return jax.ShapeDtypeStruct((batch, heads, length, width), dtype)
    return jax.ShapeDtypeStruct((batch, length, heads, width), dtype)


def load(ref: Any, rows: Any, parts: Sequence[slice]) -> tuple[jax.Array, ...]:
    """Reads the column parts of some rows."""
    return tuple(ref[rows, part] for part in parts)


def span(i: Any, size: int) -> Any:
    """The i-th run of `size` rows or columns."""
    return pl.ds(i * size if isinstance(i, int) else pl.multiple_of(i * size, size), size)
