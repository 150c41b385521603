"""What every implementation does to its inputs first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

L2_EPS = 1e-6  # inside the root, added to the sum of squares


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns float32, or float64 where an argument is float64."""
    return jnp.result_type(jnp.float32, *arrays)


def prepare_queries_keys(
    q: Float[Array, "*B H K"],
    k: Float[Array, "*B H K"],
    *,
    num_value_heads: int,
    scale: float | None,
    use_qk_l2norm: bool,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "*B HV K"], Float[Array, "*B HV K"]]:
    """Normalises queries and keys, scales the queries and repeats both to the value heads.

    Args:
      q: queries.
      k: keys.
      num_value_heads: HV, a multiple of H; value heads h·HV/H ... share query/key head h.
      scale: factor on the queries; None is 1/sqrt(K).
      use_qk_l2norm: divide queries and keys by sqrt(sum of squares + 1e-6) first.
      dtype: dtype to compute in and to return.

    Returns:
      The queries and keys.
    """
    q, k = q.astype(dtype), k.astype(dtype)
    if use_qk_l2norm:
        q = q * jax.lax.rsqrt(jnp.sum(q * q, axis=-1, keepdims=True) + L2_EPS)
        k = k * jax.lax.rsqrt(jnp.sum(k * k, axis=-1, keepdims=True) + L2_EPS)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    repeats = num_value_heads // q.shape[-2]
    if repeats > 1:
        q, k = jnp.repeat(q, repeats, axis=-2), jnp.repeat(k, repeats, axis=-2)
    return q, k
