"""Linear attention, one token after another: the specification of the operation.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ
    o_t = scale · S_tᵀ q_t

(Yang et al., "Gated Linear Attention Transformers", equation 3, with S written [K, V]; one decay
for all key channels gives retention and Mamba2.) Autodiff through it keeps the state of every
token; it is written to be read, not to be fast.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, repeat_heads
from kernels_pallas.linear_attention.step import key_decay, update_state
from kernels_pallas.segments import segment_ordinals


def linear_attention_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None,
    *,
    scale: float | None,
    initial_state: Float[Array, "B HV K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence with `lax.scan`; `chunk_size` has no effect on it."""
    del chunk_size
    if axis_name is not None:
        raise NotImplementedError("the step-by-step scan does not split T over devices (axis_name)")
    batch, length, heads, width = v.shape
    dtype = accumulation_dtype(q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (repeat_heads(x.astype(dtype), heads) for x in (q, k))
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
        q, k, v, g, is_real, is_reset = token
        start = jnp.where(is_reset[:, None, None, None], 0, state)
        written, o = update_state(start, q, k, v, g)
        state = jnp.where(is_real[:, None, None, None], written, state)
        return state, jnp.where(is_real[:, None, None], o, 0)

    tokens = (factor * q, k, v.astype(dtype), key_decay(g, k, dtype), segment_ids != 0, is_reset)
    state, o = jax.lax.scan(step, state, jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens))
    return jnp.moveaxis(o, 0, 1).astype(v.dtype), state.astype(state_dtype)
