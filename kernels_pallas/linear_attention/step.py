"""One token of linear attention, for decoding.

    S' = diag(e^g) S + k vᵀ        o = S'ᵀ (scale q)

`reference` is these lines. `xla` reads S once, since decoding is bound by the traffic of the state:
o = Sᵀ (e^g scale q) + scale (q·k) v does not wait for S'.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, repeat_heads

HIGHEST = jax.lax.Precision.HIGHEST


def key_decay(
    g: Float[Array, "..."] | None, k: Float[Array, "*B HV K"], dtype: jnp.dtype
) -> Float[Array, "*B HV #K"]:
    """Returns log decays that broadcast against keys, in `dtype`; None becomes zeros."""
    if g is None:
        return jnp.zeros((*k.shape[:-1], 1), dtype)
    return (g if g.ndim == k.ndim else g[..., None]).astype(dtype)


def update_state(
    state: Float[Array, "B HV K V"],
    q: Float[Array, "B HV K"],
    k: Float[Array, "B HV K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV #K"],
) -> tuple[Float[Array, "B HV K V"], Float[Array, "B HV V"]]:
    """Decays, writes, then reads the state (equations above); all in one dtype."""
    state = jnp.exp(g)[..., None] * state + k[..., :, None] * v[..., None, :]
    return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST)


def _prepare(q, k, v, g, state, scale):
    dtype = accumulation_dtype(q, k, v, state)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = (repeat_heads(x.astype(dtype), v.shape[1]) for x in (q, k))
    return factor * q, k, v.astype(dtype), key_decay(g, k, dtype), state.astype(dtype)


def step_reference(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None,
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step by the equations as they stand."""
    queries, keys, values, decay, old = _prepare(q, k, v, g, state, scale)
    new, o = update_state(old, queries, keys, values, decay)
    return o.astype(v.dtype), new.astype(state.dtype)


def step_xla(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV"] | Float[Array, "B HV K"] | None,
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step that reads the state as it comes in."""
    queries, keys, values, decay, old = _prepare(q, k, v, g, state, scale)
    decay = jnp.exp(decay)
    read = jnp.einsum("bhk,bhkv->bhv", decay * queries, old, precision=HIGHEST)
    o = read + jnp.sum(queries * keys, axis=-1, keepdims=True) * values
    new = decay[..., None] * old + keys[..., :, None] * values[..., None, :]
    return o.astype(v.dtype), new.astype(state.dtype)
