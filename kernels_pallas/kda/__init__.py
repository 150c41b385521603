"""Kimi Delta Attention: the delta rule with one decay a key channel."""

from kernels_pallas.kda.api import kda, kda_step

__all__ = ["kda", "kda_step"]
