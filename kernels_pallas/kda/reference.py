"""Kimi Delta Attention, one token after another: the specification of the operation.

    S~_t = diag(e^{g_t}) S_{t-1}
    δ_t  = β_t (v_t − S~_tᵀ k_t)
    S_t  = S~_t + k_t δ_tᵀ
    o_t  = S_tᵀ q_t

(Kimi Team, "Kimi Linear", arXiv:2510.26692, equation 1, with S written [K, V].) Autodiff through it
keeps the state of every token; it is written to be read, not to be fast.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, prepare_queries_keys
from kernels_pallas.kda.step import update_state
from kernels_pallas.recurrence import scan_tokens


def kda_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV K"],
    beta: Float[Array, "B T HV"],
    *,
    scale: float | None,
    initial_state: Float[Array, "B HV K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    use_qk_l2norm: bool,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence with `lax.scan`; `chunk_size` has no effect on it."""
    del chunk_size
    if axis_name is not None:
        raise NotImplementedError("the step-by-step scan does not split T over devices (axis_name)")
    batch, _, heads, width = v.shape
    dtype = accumulation_dtype(q, k, v, g, beta)
    q, k = prepare_queries_keys(
        q,
        k,
        num_value_heads=heads,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        dtype=dtype,
    )
    tokens = (q, k, *(x.astype(dtype) for x in (v, g, beta)))
    shape = (batch, heads, k.shape[-1], width)
    o, state = scan_tokens(update_state, tokens, initial_state, segment_ids, shape, dtype)
    return o.astype(v.dtype), state.astype(state_dtype)
