"""Sizes of the blocks of KDA's and the DPLR rule's kernels, by platform and shape."""

import dataclasses

from kernels_pallas.gated_delta_rule.blocks import TPU, Blocks

# Compiled for an H100, never timed. Its walks spill no registers up to K = 128.
GPU = Blocks(scores=(8, 1), walk=(4, 2), states=(4, 2), back=(4, 1), gradients=(8, 1))
WIDE = dataclasses.replace(GPU, walk=(4, 1), states=(4, 1), back=(8, 1))


def find_blocks(platform: str, key_width: int) -> Blocks:
    """Returns the blocks for a platform and a head's key width."""
    if platform == "tpu":
        return TPU
    return GPU if key_width <= 128 else WIDE


def part_width(platform: str, key_width: int) -> int:
    """Returns how many columns of K the kernels without a walk take at a time.

    Triton's registers overflow by two kilobytes a thread at 64 columns (H100, K = 128 and 192).
    """
    return key_width if platform == "tpu" else 32
