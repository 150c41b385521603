"""The dynamic convolution: a causal short convolution whose taps are computed from each token."""

from kernels_pallas.dynamic_conv.api import dynamic_conv

__all__ = ["dynamic_conv"]
