"""How Triton kernels become part of an XLA program: one call of jax-triton for all of them.

XLA compiles PTX with its own ptxas, which may be older than Triton's, so PTX is asked for in a
version that CUDA 12.8 and later read.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax_triton  # pyright: ignore[reportMissingImports]

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import TritonBlocks

# Named, since Triton 3.9 warns where it is not, and will not fuse of itself from 3.10 on.
OPTIONS = {"ptx_version": 87, "enable_fp_fusion": True}
HOPPER = 90  # compiled for where there is no GPU to ask


def key_parts(key_width: int) -> dict[str, int]:
    """Cuts the K columns of a row into one or two powers of two: K, K0 and K1."""
    first = 1 << (key_width.bit_length() - 1)
    return {"K": key_width, "K0": first, "K1": key_width - first}


def descriptor(x: jax.Array, rows: int, block: tuple[int, int]) -> Any:
    """Describes an array to the copy engine (TMA).

    Args:
      x: the array, contiguous.
      rows: how many of its leading axes make up the rows of the matrix that is seen.
      block: rows and columns of the blocks that kernels load; powers of two.

    Returns:
      An argument for `launch`.
    """
    shape = math.prod(x.shape[:rows]), math.prod(x.shape[rows:])
    return jax_triton.TensorDescriptor(x, shape, (shape[1], 1), block)


def launch(
    kernel: Any,
    arrays: Sequence[Any],
    *,
    out_type: Any,
    grid: tuple[int, ...],
    name: str,
    tile: TritonBlocks,
    **constants: int | float,
) -> Any:
    """Calls a Triton kernel.

    Args:
      kernel: the `triton.jit` function; takes the arrays, the outputs, then the constants.
      arrays: its inputs, arrays or descriptors of some.
      out_type: shapes and dtypes of its outputs.
      grid: number of programs along each axis, the first started fastest.
      name: its name in profiles.
      tile: how the work is cut; the kernel gets its columns as BV and its stages as STAGES.
      **constants: what else it takes.

    Returns:
      Its outputs.
    """
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_type=out_type,
        grid=grid,
        name=name,
        num_warps=tile.warps,
        num_stages=tile.stages,
        compute_capability=HOPPER if backend.is_forced() else None,
        backend_options=OPTIONS,
        BV=tile.columns,
        STAGES=tile.stages,
        **constants,
    )
