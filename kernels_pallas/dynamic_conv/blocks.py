"""Tile sizes of the fused kernels by device, pass and dtype; benchmarks/tune_kernels.py finds them.

A tile is `rows` tokens by `channels` channels with all their W taps. The kernels see a power of
two of taps (leading ones are 0), so a tile's product has W·channels columns.
"""

from typing import NamedTuple

import jax.numpy as jnp

MAX_TAPS = 8


class Blocks(NamedTuple):
    """One kernel's tile.

    Attributes:
      rows: tokens a program.
      channels: channels a program.
      depth: how much of R the product takes at a time (GPU; 0: all of R).
      warps: warps a program (GPU).
      stages: steps whose operands are in shared memory or on the way (GPU).
      programs: how many walk over the tiles (GPU): what the multiprocessors hold at once.
    """

    rows: int
    channels: int
    depth: int = 0
    warps: int = 0
    stages: int = 0
    programs: int = 0


# (pass, dtype) -> rows, columns of the product, depth, warps, stages, programs
_GPU = {
    ("forward", "bfloat16"): (128, 256, 64, 8, 3, 132),
    ("backward", "bfloat16"): (128, 128, 64, 4, 3, 264),
    ("forward", "float32"): (128, 128, 32, 8, 2, 132),
    ("backward", "float32"): (128, 128, 32, 8, 2, 132),
}
# (pass, dtype) -> rows, columns; what fits the 16 MB that a kernel has by default
_TPU = {
    ("forward", "bfloat16"): (256, 2048),
    ("backward", "bfloat16"): (256, 1024),
    ("forward", "float32"): (256, 1024),
    ("backward", "float32"): (128, 512),
}


def padded_width(width: int) -> int:
    """Returns the power of two of taps that the kernels see for W taps."""
    return 1 << (width - 1).bit_length()


def choose(
    device: str, which: str, dtype: jnp.dtype, length: int, channels: int, hidden: int, width: int
) -> Blocks:
    """Returns the tile for a shape.

    Args:
      device: "gpu" or "tpu".
      which: "forward" or "backward".
      dtype: u's.
      length: tokens a row, T.
      channels: D.
      hidden: R.
      width: W.

    Raises:
      NotImplementedError: the kernels do not take the shape or dtype.
    """
    key = (which, jnp.dtype(dtype).name)
    if key not in _GPU:
        raise NotImplementedError(f"u has dtype {key[1]}; the kernel takes bfloat16 and float32")
    if width > MAX_TAPS:
        raise NotImplementedError(f"W={width} taps; the kernel takes up to {MAX_TAPS}")
    if device == "gpu":
        rows, columns, depth, *rest = _GPU[key]
        wanted = columns // padded_width(width)
        fits = next((c for c in (64, 32, 16) if c <= wanted and channels % c == 0), None)
        if length < rows:
            raise NotImplementedError(f"T={length} tokens a row; the kernel takes {rows} or more")
        if fits is None:
            raise NotImplementedError(f"D={channels} is not a multiple of 16")
        while depth > 32 and -hidden % depth > -hidden % 32:  # the rest is filled with zeros
            depth //= 2
        return Blocks(rows, fits, depth, *rest)
    if length < 16:
        raise NotImplementedError(f"T={length} tokens a row; the kernel takes 16 or more")
    rows, columns = _TPU[key]
    rows, wanted = min(rows, length // 16 * 16), columns // padded_width(width)
    if channels % 128 == 0:
        fits = next(c for c in (512, 256, 128) if channels % c == 0 and c <= max(wanted, 128))
        return Blocks(rows, fits)
    # A part of the channels must be a multiple of 128 lanes; otherwise all of them, of fewer rows.
    while rows > 16 and rows * channels > _TPU[key][0] * wanted:
        rows = rows // 32 * 16
    if channels > 1024 or rows * channels > _TPU[key][0] * wanted:
        raise NotImplementedError(
            f"D={channels} is not a multiple of 128, and too many for one tile"
        )
    return Blocks(rows, channels)
