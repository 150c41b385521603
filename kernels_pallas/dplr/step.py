"""One token of the diagonal plus low-rank delta rule, for decoding.

    u = Sᵀa        S' = diag(e^g) S + b uᵀ + k vᵀ        o = S'ᵀ (scale q)

`reference` is these lines. `xla` reads S once for both products, since decoding is bound by the
traffic of the state: o = scale (Sᵀ (e^g q) + (q·b) u + (q·k) v).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype

HIGHEST = jax.lax.Precision.HIGHEST


def update_state(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    g: Float[Array, "B H K"],
) -> tuple[Float[Array, "B H K V"], Float[Array, "B H V"]]:
    """Reads, decays, writes, then reads the state again (equations above); all in one dtype."""
    u = jnp.einsum("bhkv,bhk->bhv", state, a, precision=HIGHEST)
    state = jnp.exp(g)[..., None] * state
    state = state + b[..., :, None] * u[..., None, :] + k[..., :, None] * v[..., None, :]
    return state, jnp.einsum("bhkv,bhk->bhv", state, q, precision=HIGHEST)


def _prepare(q, k, v, a, b, g, state, scale):
    dtype = accumulation_dtype(q, k, v, a, b, g, state)
    q, *rest = (x.astype(dtype) for x in (q, k, v, a, b, g, state))
    return scale * q, *rest


def step_reference(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    g: Float[Array, "B H K"],
    state: Float[Array, "B H K V"],
    *,
    scale: float,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """Takes one step by the equations as they stand."""
    *token, old = _prepare(q, k, v, a, b, g, state, scale)
    new, o = update_state(old, *token)
    return o.astype(v.dtype), new.astype(state.dtype)


def step_xla(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    g: Float[Array, "B H K"],
    state: Float[Array, "B H K V"],
    *,
    scale: float,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """Takes one step with both products of the old state in one pass over it."""
    queries, keys, values, reads, writes, decay, old = _prepare(q, k, v, a, b, g, state, scale)
    decay = jnp.exp(decay)
    both = jnp.stack([decay * queries, reads], axis=2)
    both = jnp.einsum("bhxk,bhkv->bhxv", both, old, precision=HIGHEST)
    read, u = both[:, :, 0], both[:, :, 1]
    along_b, along_k = (jnp.sum(queries * x, axis=-1, keepdims=True) for x in (writes, keys))
    o = read + along_b * u + along_k * values
    new = decay[..., None] * old + writes[..., None] * u[..., None, :]
    new = new + keys[..., None] * values[..., None, :]
    return o.astype(v.dtype), new.astype(state.dtype)
