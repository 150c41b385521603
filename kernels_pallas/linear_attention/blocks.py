"""Sizes of the kernels' blocks, by platform and key width."""

import dataclasses

CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
      chunks: chunks a program in the kernels that take all chunks at once (terms, gradients).
      walk_chunks: chunks a program of the walks holds at a time; 0 is the whole sequence.
      v_block: columns of V a program of the walks takes; 0 is all.
      v_step: columns of V that the gradient kernels take at a time; 0 is all.
      channels: columns of K that the kernels of decays per channel take at a time; 0 is all.
      terms: (warps, stages) of the kernels of what one chunk alone determines.
      walk: the same of the walk with outputs.
      states: the same of the walk that rebuilds states.
      back: the same of the walk back.
      gradients: the same of the gradient kernel of one decay a head.
      channel_gradients: the same of that of one a key channel.
      enough: programs of a walk that keep the device busy; with fewer, T is cut into segments.
      programs: programs of a walk to cut it into then.
    """

    chunks: int = 1
    walk_chunks: int = 0
    v_block: int = 64
    v_step: int = 64
    channels: int = 64
    terms: tuple[int, int] = (4, 1)
    walk: tuple[int, int] = (4, 2)
    states: tuple[int, int] = (4, 3)
    back: tuple[int, int] = (4, 2)
    gradients: tuple[int, int] = (8, 2)
    channel_gradients: tuple[int, int] = (4, 1)
    enough: int = 132
    programs: int = 768


# Measured on an H100: terms and gradients of decays per channel.
GPU = Blocks()
TPU = Blocks(chunks=8, walk_chunks=8, v_block=0, v_step=0, channels=0, enough=0)


def find_blocks(platform: str, key_width: int) -> Blocks:
    """Returns the blocks for a platform and a head's key width."""
    if platform == "tpu":
        return TPU
    if key_width % GPU.channels == 0:
        return GPU
    return dataclasses.replace(GPU, channels=32, channel_gradients=(2, 1))
