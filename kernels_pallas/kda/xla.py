"""Kimi Delta Attention in chunks, in plain XLA, with its own derivative.

With G the running sum of g inside a chunk, C its last row and S the state before it:

    Q̂ = q e^G        K̂ = k e^G        K_e = k e^{G_C − G}        γ = e^{G_C}
    A = stril(β Σ_i k_ti k_ji e^{G_ti − G_ji})        P = tril(Σ_i q_ti k_ji e^{G_ti − G_ji})
    T = (I + A)^-1    R = β (V − K̂ S)    U = T R    O = Q̂ S + P U    S' = γ S + K_eᵀ U

The walk over the chunks and back is delta_walk.py, with Â = −β K̂, B̂ = K_e and R₀ = β V; everything
else is done for all chunks at once (vector_decay.py), and its gradients are pulled back by JAX.
The backward pass keeps the inputs and T, C values a token and head; it rebuilds one state a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.delta_walk import Terms, gradients, walk
from kernels_pallas.gated_delta_rule.chunk_math import strictly_lower, unit_lower_inverse
from kernels_pallas.gated_delta_rule.chunks import from_chunks, to_chunks
from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, prepare_queries_keys
from kernels_pallas.vector_decay import decay_factors, pair_scores, with_borders

INVERSE = "kda_inverse"  # the name that remat policies know T by


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float | None
    use_qk_l2norm: bool
    chunk: int  # C


class Local(NamedTuple):
    """What one chunk alone determines, but for T."""

    reads: Float[Array, "N B HV 2C K"]  # Q̂ above −β K̂
    writes: Float[Array, "N B HV C K"]  # K_e
    whole: Float[Array, "N B HV K"]  # γ
    source: Float[Array, "N B HV C V"]  # β V
    lower: Float[Array, "N B HV C C"]  # A
    scores: Float[Array, "N B HV C C"]  # P


def kda_xla(
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
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence in chunks of `chunk_size`, or fewer tokens where T is shorter."""
    if axis_name is not None:
        raise NotImplementedError("the chunked scan does not split T over devices (axis_name)")
    if initial_state is None:
        dtype = accumulation_dtype(q, k, v, g, beta)
        initial_state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype)
    while chunk_size > 16 and chunk_size >= 2 * v.shape[1]:
        chunk_size //= 2
    options = Options(scale, use_qk_l2norm, chunk_size)
    o, state = _chunked(options, q, k, v, g, beta, initial_state, segment_ids)
    return o, state.astype(state_dtype)


def _dtypes(q, k, v, g, beta) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtype of the products' operands and that of the sums and the state."""
    dtype = accumulation_dtype(q, k, v, g, beta)
    return (v.dtype if v.dtype == jnp.bfloat16 else dtype), dtype


def _local(options: Options, q, k, v, g, beta, segment_ids) -> Local:
    _, dtype = _dtypes(q, k, v, g, beta)
    q, k = prepare_queries_keys(
        q,
        k,
        num_value_heads=v.shape[2],
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        dtype=dtype,
    )
    v, g, beta = (x.astype(dtype) for x in (v, g, beta))
    g = to_chunks(with_borders(g, segment_ids), options.chunk, None)
    q, k, v, beta = (to_chunks(x, options.chunk, segment_ids) for x in (q, k, v, beta))
    decay, beta = decay_factors(g), beta[..., None]
    rows, keys = jnp.stack([q, k], axis=-3), k[..., None, :, :]
    # In full: the inverse amplifies what rounding would do to products of keys.
    pairs = pair_scores(rows, keys, g, before=(False, False), operands=dtype)[..., 0, :, :]
    scores, gram = pairs[..., 0, :, :], pairs[..., 1, :, :]
    reads = jnp.concatenate([decay.from_start * q, -beta * (decay.from_start * k)], axis=-2)
    return Local(
        reads, decay.to_end * k, decay.whole, beta * v, strictly_lower(beta * gram), scores
    )


def _terms(local: Local, inverse) -> Terms:
    return Terms(local.reads, local.writes, inverse, local.scores, local.source, local.whole, None)


def _forward(options, q, k, v, g, beta, initial_state, segment_ids):
    operands, dtype = _dtypes(q, k, v, g, beta)
    local = _local(options, q, k, v, g, beta, segment_ids)
    inverse = checkpoint_name(unit_lower_inverse(local.lower), INVERSE)
    o, state = walk(_terms(local, inverse), initial_state.astype(dtype), operands)
    o = from_chunks(o, v.shape[1])
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return (o.astype(v.dtype), state), (q, k, v, g, beta, initial_state, segment_ids, inverse)


def _backward(options, residuals, cotangents):
    *inputs, initial_state, segment_ids, inverse = residuals
    do, dstate = cotangents
    operands, dtype = _dtypes(*inputs)
    local, pull = jax.vjp(lambda *x: _local(options, *x, segment_ids=segment_ids), *inputs)
    do = to_chunks(do.astype(dtype), options.chunk, segment_ids)
    state = initial_state.astype(dtype)
    d, dinitial = gradients(_terms(local, inverse), state, do, dstate.astype(dtype), operands)
    dlocal = Local(d.reads, d.writes, d.whole, d.source, d.inverse, d.scores)
    return (*pull(dlocal), dinitial.astype(initial_state.dtype), None)


def _outputs(options, q, k, v, g, beta, initial_state, segment_ids):
    outputs, _ = _forward(options, q, k, v, g, beta, initial_state, segment_ids)
    return outputs


_chunked = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)
