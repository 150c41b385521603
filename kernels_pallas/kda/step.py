"""One token of Kimi Delta Attention, for decoding.

    S~ = diag(e^g) S        δ = β (v − S~ᵀk)        S' = S~ + k δᵀ        o = S'ᵀq

`reference` is these lines. `xla` reads S once for both products, since decoding is bound by the
traffic of the state: δ = β (v − Sᵀ (e^g k))  and  o = Sᵀ (e^g q) + (q·k) δ.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, prepare_queries_keys

HIGHEST = jax.lax.Precision.HIGHEST


def update_state(
    state: Float[Array, "B HV K V"],
    q: Float[Array, "B HV K"],
    k: Float[Array, "B HV K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV K"],
    beta: Float[Array, "B HV"],
) -> tuple[Float[Array, "B HV K V"], Float[Array, "B HV V"]]:
    """Decays, writes, then reads the state (equations above); all in one dtype."""
    state = jnp.exp(g)[..., None] * state
    delta = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", state, k, precision=HIGHEST))
    state = state + k[..., :, None] * delta[..., None, :]
    return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST)


def _prepare(q, k, v, g, beta, state, scale, use_qk_l2norm):
    dtype = accumulation_dtype(q, k, v, g, beta, state)
    q, k = prepare_queries_keys(
        q,
        k,
        num_value_heads=v.shape[1],
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        dtype=dtype,
    )
    return q, k, *(x.astype(dtype) for x in (v, g, beta, state))


def step_reference(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV K"],
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step by the equations as they stand."""
    *token, old = _prepare(q, k, v, g, beta, state, scale, use_qk_l2norm)
    new, o = update_state(old, *token)
    return o.astype(v.dtype), new.astype(state.dtype)


def step_xla(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV K"],
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step with both products of the old state in one pass over it."""
    queries, keys, values, decay, strength, old = _prepare(
        q, k, v, g, beta, state, scale, use_qk_l2norm
    )
    decay = jnp.exp(decay)
    reads = decay[:, :, None] * jnp.stack([queries, keys], axis=2)
    both = jnp.einsum("bhxk,bhkv->bhxv", reads, old, precision=HIGHEST)
    delta = strength[..., None] * (values - both[:, :, 1])
    o = both[:, :, 0] + jnp.sum(queries * keys, axis=-1, keepdims=True) * delta
    new = decay[..., None] * old + keys[..., :, None] * delta[..., None, :]
    return o.astype(v.dtype), new.astype(state.dtype)
