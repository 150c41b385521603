"""What every implementation does to its inputs first."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

L2_EPS = 1e-6  # inside the root, added to the sum of squares


def accumulation_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Returns float32, or float64 where an argument is float64."""
    return jnp.result_type(jnp.float32, *arrays)


def row_factors(
    q: Float[Array, "*B H K"],
    k: Float[Array, "*B H K"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "*B H"], Float[Array, "*B H"]]:
    """Returns the factors that normalise and scale each query, and normalise each key.

    Args:
      q: queries.
      k: keys.
      scale: factor on the queries; None is 1/sqrt(K).
      use_qk_l2norm: divide queries and keys by sqrt(sum of squares + 1e-6).
      dtype: dtype to compute in and to return.

    Returns:
      One factor for each query row and each key row.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    if not use_qk_l2norm:
        return jnp.full(q.shape[:-1], factor, dtype), jnp.ones(k.shape[:-1], dtype)
    squares = [jnp.sum(jnp.square(x.astype(dtype)), axis=-1) for x in (q, k)]
    factor_q, factor_k = (jax.lax.rsqrt(x + L2_EPS) for x in squares)
    return factor_q * factor, factor_k


def repeat_heads(x: Float[Array, "*B H K"], num_value_heads: int) -> Float[Array, "*B HV K"]:
    """Repeats query or key heads so that value heads h·HV/H, h·HV/H + 1, ... get head h."""
    repeats = num_value_heads // x.shape[-2]
    return x if repeats == 1 else jnp.repeat(x, repeats, axis=-2)


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

    Arguments are those of `row_factors` and `repeat_heads`; the result has dtype `dtype`.
    """
    factors = row_factors(q, k, scale=scale, use_qk_l2norm=use_qk_l2norm, dtype=dtype)
    q, k = (x.astype(dtype) * f[..., None] for x, f in zip((q, k), factors, strict=True))
    return repeat_heads(q, num_value_heads), repeat_heads(k, num_value_heads)
