"""The delta rule with a diagonal plus low-rank transition, that of RWKV-7."""

from kernels_pallas.dplr.api import dplr_delta_rule, dplr_delta_rule_step

__all__ = ["dplr_delta_rule", "dplr_delta_rule_step"]
