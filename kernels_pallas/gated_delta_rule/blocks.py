"""Sizes of the kernels' blocks, by platform and shape. `benchmarks/tune_kernels.py` finds them."""

import dataclasses
import math

import jax.numpy as jnp

CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      chunks: chunks a program in the kernels that take all chunks at once (scores, gradients).
      walk_chunks: chunks a program of the walks holds at a time; 0 is the whole sequence.
      v_block: columns of V a program of the walks takes; 0 is all.
      v_step: columns of V that the gradient kernel takes at a time; 0 is all.
      scores: (warps, stages) of the score kernel.
      walk: the same of the walk with outputs.
      states: the same of the walk that rebuilds states and errors.
      back: the same of the walk back.
      gradients: the same of the gradient kernel.
      pairs: the same of that of the scores' gradients, where it is one of its own.
      enough: programs of a walk that keep the device busy; with fewer, T is cut into segments.
      programs: programs of a walk to cut it into then.
      ahead: whether the walk with outputs reads rows one chunk early and V through a product.
      driver: "pallas" or "triton"; None is the faster one that can be had (drivers.py).
    """

    chunks: int = 1
    walk_chunks: int = 0
    v_block: int = 64
    v_step: int = 64
    scores: tuple[int, int] = (4, 1)
    walk: tuple[int, int] = (4, 2)
    states: tuple[int, int] = (4, 3)
    back: tuple[int, int] = (4, 2)
    gradients: tuple[int, int] = (8, 2)
    pairs: tuple[int, int] = (4, 2)
    enough: int = 132
    programs: int = 768
    ahead: bool = False
    driver: str | None = None


GPU = Blocks()  # measured on an H100 at K = 64, 96 and 128
TPU = Blocks(chunks=8, walk_chunks=8, v_block=0, v_step=0, enough=0)  # compiled, never timed

# Largest key width to blocks, H100. A wide state takes the registers that prefetching would.
BY_KEY_WIDTH = {
    96: dataclasses.replace(GPU, ahead=True),
    128: GPU,
    192: dataclasses.replace(GPU, walk=(4, 1), states=(4, 2), back=(4, 1)),
    256: dataclasses.replace(GPU, walk=(8, 2), states=(4, 2), back=(8, 2)),
}


def find_blocks(platform: str, key_width: int) -> Blocks:
    """Returns the blocks for a platform and a head's key width."""
    if platform == "tpu":
        return TPU
    return next(blocks for width, blocks in BY_KEY_WIDTH.items() if key_width <= width)


@dataclasses.dataclass(frozen=True)
class TritonBlocks:
    """How the work of a kernel of Triton proper is cut.

    Attributes:
      columns: columns of V a program takes at a time.
      warps: warps a program.
      stages: depth of the pipeline of its loop over chunks or columns.
      resident: programs that a multiprocessor runs at once.
      step: microseconds that those take for a chunk.
    """

    columns: int = 64
    warps: int = 4
    stages: int = 3
    resident: int = 1
    step: float = 1.0


MULTIPROCESSORS = 132  # of an H100
# By kernel; steps from K = 96, V = 256. A kernel that is not here has the default.
TRITON = {
    "walk output": (TritonBlocks(step=1.6), TritonBlocks(columns=128, warps=8, step=2.6)),
    "walk back": (TritonBlocks(step=2.1), TritonBlocks(stages=2, resident=2, step=4.0)),
}


def find_triton_walk(kernel: str, rows: int, width: int) -> TritonBlocks:
    """Chooses the blocks of a walk: those whose rounds of programs end first.

    Args:
      kernel: its name in `TRITON`.
      rows: states, B·HV.
      width: V, a multiple of 64.
    """

    def duration(blocks: TritonBlocks) -> float:
        programs = rows * width // blocks.columns
        return math.ceil(programs / (MULTIPROCESSORS * blocks.resident)) * blocks.step

    fitting = [x for x in TRITON.get(kernel, (TritonBlocks(),)) if width % x.columns == 0]
    return min(fitting, key=duration)


def find_triton_gradients(key_width: int) -> TritonBlocks:
    """Returns the blocks of the gradient kernel."""
    if key_width > 96:
        return TritonBlocks(stages=2)
    return TritonBlocks(columns=32)


@dataclasses.dataclass(frozen=True)
class StepBlocks:
    """How the work of one decoding step is cut.

    Attributes:
      v_block: columns of V a program takes on a GPU, a power of two.
      warps: warps a program on a GPU.
      part: rows of K in one tile on a GPU, at most.
      head_bytes: bytes of states a program takes at most on a TPU (at least one head's).
    """

    v_block: int = 64
    warps: int = 4
    part: int = 16
    head_bytes: int = 2**20


# By the state's dtype, H100, B128 H12 K96 V256. A row of a block is 256 bytes.
STEP = {"float32": StepBlocks(), "bfloat16": StepBlocks(v_block=128, part=32)}
STEP_FEW = StepBlocks(v_block=32)  # B1 and B8 there: more programs, each with less to wait for
FEW = 528  # programs of 64 columns that an H100 runs at once, by registers


def find_step_blocks(
    rows: int, key_width: int, value_width: int, state_dtype: jnp.dtype
) -> StepBlocks:
    """Returns the blocks for one step.

    Args:
      rows: states, B·HV.
      key_width: K.
      value_width: V.
      state_dtype: float32 or bfloat16.
    """
    if rows * value_width < FEW * 64:
        return STEP_FEW
    blocks = STEP[jnp.dtype(state_dtype).name]
    # Compiled for an H100, not timed: more warps for the registers of a taller block.
    if key_width > 128:
        return dataclasses.replace(blocks, v_block=64, warps=8)
    return dataclasses.replace(blocks, warps=8 if key_width * blocks.v_block > 12288 else 4)
