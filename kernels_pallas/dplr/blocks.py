"""Sizes of the blocks of KDA's and the DPLR rule's kernels, by platform and shape."""

import dataclasses

from kernels_pallas.gated_delta_rule.blocks import TPU, Blocks

# Measured on an H100: prepare and gradients. The walks are as they compile without spills.
GPU = Blocks(scores=(4, 1), walk=(4, 2), states=(4, 2), back=(4, 1), gradients=(8, 1))
WIDE = dataclasses.replace(GPU, walk=(4, 1), states=(4, 1), back=(8, 1))


def find_blocks(platform: str, key_width: int) -> Blocks:
    """Returns the blocks for a platform and a head's key width."""
    if platform == "tpu":
        return TPU
    blocks = GPU if key_width <= 128 else WIDE
    # Parts of 32 columns (`gradient_part`) are fastest with two warps: 5.4 ms, 14 with eight.
    return blocks if key_width % 64 == 0 else dataclasses.replace(blocks, gradients=(2, 1))


def part_width(platform: str, key_width: int) -> int:
    """Returns how many columns of K `prepare` takes at a time."""
    return key_width if platform == "tpu" else 32


def gradient_part(platform: str, key_width: int) -> int:
    """Returns how many columns of K a program of the gradients takes."""
    if platform == "tpu":
        return key_width
    return 64 if key_width % 64 == 0 else 32
