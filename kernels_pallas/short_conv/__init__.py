"""The short convolution: causal, depthwise, with taps that are the same for every token."""

from kernels_pallas.short_conv.api import short_conv

__all__ = ["short_conv"]
