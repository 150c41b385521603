"""The gated delta rule, one token after another: the specification of the operation.

    S~_t = e^{g_t} S_{t-1}
    δ_t  = β_t (v_t − S~_tᵀ k_t)
    S_t  = S~_t + k_t δ_tᵀ
    o_t  = S_tᵀ q_t

(Yang, Kautz and Hatamizadeh, "Gated Delta Networks", equation 10, with S transposed.) Autodiff
through it keeps the state of every token; it is written to be read, not to be fast.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, prepare_queries_keys
from kernels_pallas.gated_delta_rule.step import update_state
from kernels_pallas.segments import segment_ordinals


def gated_delta_rule_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"] | None,
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
    batch, length, heads, width = v.shape
    dtype = accumulation_dtype(q, k, v, beta)
    q, k = prepare_queries_keys(
        q,
        k,
        num_value_heads=heads,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        dtype=dtype,
    )
    decay = jnp.zeros_like(beta, dtype) if g is None else g.astype(dtype)
    if initial_state is None:
        state = jnp.zeros((batch, heads, k.shape[-1], width), dtype)
    else:
        state = initial_state.astype(dtype)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    ordinals = segment_ordinals(segment_ids)
    # The first segment continues the initial state; every later one starts from zeros.
    is_reset = jnp.diff(ordinals, axis=1, prepend=0) > 0

    def step(state, token):
        q, k, v, g, beta, is_real, is_reset = token
        start = jnp.where(is_reset[:, None, None, None], 0, state)
        written, o = update_state(start, q, k, v, g, beta)
        state = jnp.where(is_real[:, None, None, None], written, state)
        return state, jnp.where(is_real[:, None, None], o, 0)

    tokens = (q, k, v.astype(dtype), decay, beta.astype(dtype), segment_ids != 0, is_reset)
    state, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state.astype(state_dtype)
