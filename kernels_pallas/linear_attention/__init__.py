"""Linear attention with decay: RetNet, Mamba2 (one decay a head) and GLA (one a key channel)."""

from kernels_pallas.linear_attention.api import linear_attention, linear_attention_step

__all__ = ["linear_attention", "linear_attention_step"]
