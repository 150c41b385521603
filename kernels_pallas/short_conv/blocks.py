"""Tile sizes of the kernels by device, pass and number of taps.

A GPU's tile is a strip that a program walks down row by row; a TPU's lies in VMEM as a whole.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

MAX_TAPS = 8
FEWEST_ROWS = 16
# Most channels that are not a multiple of 128 lanes, so that a TPU's tile must hold all of them.
MOST_CHANNELS = 4096


class Blocks(NamedTuple):
    """One kernel's tile.

    Attributes:
      rows: tokens a program.
      channels: channels a program.
      warps: warps a program (GPU).
      at_once: rows that are loaded together, while those before them are worked on (GPU).
    """

    rows: int
    channels: int
    warps: int = 0
    at_once: int = 0


# pass -> rows at the most; one warp takes 4 channels a lane, 2 where many taps fill its registers
_GPU = {"forward": 128, "backward": 256}
_GPU_PROGRAMS = 4096  # fill an H100 twice over
# pass -> rows, channels
_TPU = {"forward": (512, 512), "backward": (256, 512)}


def choose(device: str, which: str, shape: tuple[int, ...], dtype: DTypeLike, width: int) -> Blocks:
    """Returns the tile for a shape.

    Args:
      device: "gpu" or "tpu".
      which: "forward" or "backward".
      shape: u's, [B, T, D].
      dtype: u's.
      width: W.

    Raises:
      NotImplementedError: the kernels do not take the shape or dtype.
    """
    batch, length, channels = shape
    name = jnp.dtype(dtype).name
    if name not in ("bfloat16", "float32"):
        raise NotImplementedError(f"u has dtype {name}; the kernel takes bfloat16 and float32")
    if width > MAX_TAPS:
        raise NotImplementedError(f"W={width} taps; the kernel takes up to {MAX_TAPS}")
    if length < FEWEST_ROWS:
        raise NotImplementedError(
            f"T={length} tokens a row; the kernel takes {FEWEST_ROWS} or more"
        )
    if channels % 16:
        raise NotImplementedError(f"D={channels} is not a multiple of 16")
    return (_gpu if device == "gpu" else _tpu)(which, batch, length, channels, width)


def _gpu(which, batch, length, channels, width):
    if batch * length * channels >= 2**31:
        raise NotImplementedError(
            f"u has {batch * length * channels} values; the kernel counts them with 32 bits"
        )
    rows, part = _GPU[which], 128 if width <= 4 else 64
    strips = batch * -(-channels // part)
    # Shorter strips read more rows twice.
    while rows > 32 and strips * -(-length // rows) < _GPU_PROGRAMS:
        rows //= 2
    return Blocks(rows, part, 1, 4 if width <= 5 else 8)  # W-1 or more


def _tpu(which, batch, length, channels, width):
    rows, part = _TPU[which]
    rows = min(rows, length // 16 * 16)
    if channels % 128 == 0:
        return Blocks(rows, next(c for c in (part, 256, 128) if channels % c == 0))
    if channels > MOST_CHANNELS:
        raise NotImplementedError(
            f"D={channels} is not a multiple of 128, and too many for one tile"
        )
    while rows > 16 and rows * channels > _TPU[which][0] * part:
        rows = rows // 32 * 16
    return Blocks(rows, channels)
