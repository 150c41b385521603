"""The gated delta rule: a linear-attention state with decay, written by the delta rule."""

from kernels_pallas.gated_delta_rule.api import gated_delta_rule, gated_delta_step

__all__ = ["gated_delta_rule", "gated_delta_step"]
