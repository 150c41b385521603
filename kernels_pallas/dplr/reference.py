"""The diagonal plus low-rank delta rule, one token after another: the specification.

    S_t = diag(e^{g_t}) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ
    o_t = scale · S_tᵀ q_t

(Peng et al., "RWKV-7 Goose", arXiv:2503.14456, equation 17 with S transposed, a = −κ̂ and b = κ̂ a.)
Note that a reads the state before its decay. Autodiff through it keeps the state of every token; it
is written to be read, not to be fast.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dplr.step import update_state
from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype
from kernels_pallas.recurrence import scan_tokens


def dplr_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    g: Float[Array, "B T H K"],
    *,
    scale: float,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the recurrence with `lax.scan`; `chunk_size` has no effect on it."""
    del chunk_size
    if axis_name is not None:
        raise NotImplementedError("the step-by-step scan does not split T over devices (axis_name)")
    batch, _, heads, width = v.shape
    dtype = accumulation_dtype(q, k, v, a, b, g)
    queries, *rest = (x.astype(dtype) for x in (q, k, v, a, b, g))
    tokens = (scale * queries, *rest)
    shape = (batch, heads, k.shape[-1], width)
    o, state = scan_tokens(update_state, tokens, initial_state, segment_ids, shape, dtype)
    return o.astype(v.dtype), state.astype(state_dtype)
