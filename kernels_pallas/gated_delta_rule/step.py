"""One token of the gated delta rule, for decoding.

    S~ = e^g S        δ = β (v − S~ᵀk)        S' = S~ + k δᵀ        o = S'ᵀq

`reference` is these lines. `xla` reads S once for both products, since decoding is bound by the
traffic of the state: with a = Sᵀk and b = Sᵀq,  δ = β (v − e^g a)  and  o = e^g b + (q·k) δ.
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
    g: Float[Array, "B HV"],
    beta: Float[Array, "B HV"],
) -> tuple[Float[Array, "B HV K V"], Float[Array, "B HV V"]]:
    """Decays, writes, then reads the state (equations above); all in one dtype."""
    state = jnp.exp(g)[..., None, None] * state
    delta = beta[..., None] * (v - jnp.einsum("bhkv,bhk->bhv", state, k, precision=HIGHEST))
    state = state + k[..., :, None] * delta[..., None, :]
    return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST)


def step_reference(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV"] | None,
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step by the equations as they stand."""
    dtype = accumulation_dtype(q, k, v, beta, state)
    queries, keys = prepare_queries_keys(
        q,
        k,
        num_value_heads=v.shape[1],
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        dtype=dtype,
    )
    decay = jnp.zeros_like(beta, dtype) if g is None else g.astype(dtype)
    new_state, o = update_state(
        state.astype(dtype), queries, keys, v.astype(dtype), decay, beta.astype(dtype)
    )
    return o.astype(v.dtype), new_state.astype(state.dtype)


def step_xla(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV"] | None,
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step with both products of the old state in one pass over it."""
    dtype = accumulation_dtype(q, k, v, beta, state)
    queries, keys = prepare_queries_keys(
        q,
        k,
        num_value_heads=v.shape[1],
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
        dtype=dtype,
    )
    old = state.astype(dtype)
    gamma = jnp.ones_like(beta, dtype) if g is None else jnp.exp(g.astype(dtype))
    gamma = gamma[..., None]
    both = jnp.einsum("bhxk,bhkv->bhxv", jnp.stack([queries, keys], axis=2), old, precision=HIGHEST)
    delta = beta.astype(dtype)[..., None] * (v.astype(dtype) - gamma * both[:, :, 1])
    overlap = jnp.sum(queries * keys, axis=-1, keepdims=True)
    o = gamma * both[:, :, 0] + overlap * delta
    new_state = gamma[..., None] * old + keys[..., :, None] * delta[..., None, :]
    return o.astype(v.dtype), new_state.astype(state.dtype)
