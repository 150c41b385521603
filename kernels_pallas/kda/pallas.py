"""Kimi Delta Attention in the kernels of the DPLR delta rule (dplr/kernels.py).

KDA is that rule with a = −k, b = β k and k read after its row's own decay. The kernels take the
queries and keys as they were given and the factors that normalise and scale their rows; what they
return are the gradients of normalised rows, which are pulled through the normalisation here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dplr.kernels import (
    Rows,
    forward,
    kernel_gradients,
    padded,
    start,
    unpadded,
)
from kernels_pallas.gated_delta_rule.blocks import CHUNK, Blocks
from kernels_pallas.gated_delta_rule.gates import from_rows, to_rows
from kernels_pallas.gated_delta_rule.inputs import prepare_queries_keys, repeat_heads, row_factors
from kernels_pallas.kda.xla import INVERSE

FLOAT32 = jnp.dtype(jnp.float32)
SMALLEST = 1e-20  # a writing strength under this is treated as 0


def kda_pallas(
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
    blocks: Blocks | None = None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence in kernels; `blocks` overrides the table of dplr/blocks.py."""
    options = start(
        q,
        v,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        chunk_size=chunk_size,
        inverse=INVERSE,
        axis_name=axis_name,
        blocks=blocks,
    )
    others = [g, q, k, beta.astype(jnp.float32)]
    given, state = padded(options, v, others, initial_state, segment_ids)
    values, g, q, k, beta = given
    o, state = _rule((options, use_qk_l2norm), q, k, values, g, beta, state)
    return unpadded(o, state, v, segment_ids, state_dtype)


def _rows(options, q, k, v, g, beta) -> Rows:
    """Adds the factors of q, of a = −k and of b = β k."""
    options, use_qk_l2norm = options
    of_q, of_k = (
        repeat_heads(x[..., None], v.shape[2])[..., 0]
        for x in row_factors(q, k, scale=options.scale, use_qk_l2norm=use_qk_l2norm, dtype=FLOAT32)
    )
    factors = tuple(to_rows(x, CHUNK) for x in (of_q, -of_k, beta * of_k))
    return Rows(q, k, v, None, None, g, factors, to_rows(beta, CHUNK))


def _forward(options, q, k, v, g, beta, state):
    out, kept = forward(options[0], _rows(options, q, k, v, g, beta), state)
    return out, (q, k, v, g, beta, kept._replace(rows=None))


def _backward(options, residuals, cotangents):
    q, k, v, g, beta, kept = residuals
    rows = _rows(options, q, k, v, g, beta)
    d, dv, dfirst, by_errors = kernel_gradients(options[0], kept._replace(rows=rows), *cotangents)

    def normalised(q, k):
        return prepare_queries_keys(
            q,
            k,
            num_value_heads=v.shape[2],
            scale=options[0].scale,
            use_qk_l2norm=options[1],
            dtype=FLOAT32,
        )

    _, pull = jax.vjp(normalised, q, k)
    dq, dk = pull((d.q, d.k))
    is_written = rows.beta > SMALLEST
    # dV is β times the gradient of δ; where β is 0, δ's gradient comes from what it is written to.
    dbeta = jnp.where(is_written, by_errors / jnp.where(is_written, rows.beta, 1.0), d.beta)
    return dq, dk, dv, d.g, from_rows(dbeta), dfirst


def _outputs(options, q, k, v, g, beta, state):
    return _forward(options, q, k, v, g, beta, state)[0]


_rule = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_rule.defvjp(_forward, _backward)
