"""The operations of linear attention layers, each with several implementations."""

from kernels_pallas.dplr import dplr_delta_rule, dplr_delta_rule_step
from kernels_pallas.dynamic_conv import dynamic_conv
from kernels_pallas.gated_delta_rule import gated_delta_rule, gated_delta_step
from kernels_pallas.kda import kda, kda_step
from kernels_pallas.linear_attention import linear_attention, linear_attention_step
from kernels_pallas.segments import (
    segment_ordinals,
    segment_positions,
    segment_starts,
    validate_segment_ids,
)
from kernels_pallas.short_conv import short_conv

__all__ = [
    "dplr_delta_rule",
    "dplr_delta_rule_step",
    "dynamic_conv",
    "gated_delta_rule",
    "gated_delta_step",
    "kda",
    "kda_step",
    "linear_attention",
    "linear_attention_step",
    "segment_ordinals",
    "segment_positions",
    "segment_starts",
    "short_conv",
    "validate_segment_ids",
]
