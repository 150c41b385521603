"""The gated delta rule in chunks, in plain XLA, with its own derivative.

Equations: chunk_math.py. What depends on one chunk alone (decay factors, QKᵀ, KKᵀ, the inverse T)
is computed for all chunks at once; a scan over the chunks carries the state. The backward pass
keeps the inputs and T, runs the scan again for the state before each chunk, walks back through
the chunks for dS, and computes all other gradients for all chunks at once.

With bfloat16 inputs the operands of the products are bfloat16, but for T and what it multiplies:
T's entries grow and alternate where keys resemble each other, as SiLU makes them, and rounding
them would be the largest error by far.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.chunk_math import (
    Decay,
    decay_gradient,
    dot,
    strictly_lower,
    unit_lower_inverse,
)
from kernels_pallas.gated_delta_rule.chunks import (
    Chunks,
    Options,
    Rows,
    cut_inputs,
    cut_rows,
    from_chunks,
    local_terms,
    to_chunks,
)
from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype

INVERSE = "gated_delta_rule_inverse"  # the name that remat policies know T by


def gated_delta_rule_xla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"] | None,
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
        raise NotImplementedError("the chunked scan does not split T over devices yet (axis_name)")
    dtype = accumulation_dtype(q, k, v, beta)
    if g is None:
        g = jnp.zeros(beta.shape, dtype)
    if initial_state is None:
        initial_state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype)
    while chunk_size > 16 and chunk_size >= 2 * v.shape[1]:
        chunk_size //= 2
    options = Options(scale, use_qk_l2norm, chunk_size)
    arguments = (options, q, k, v, g, beta, initial_state, segment_ids)
    o, state = _chunked(*arguments)
    return o, state.astype(state_dtype)


def _dtypes(q, k, v, beta) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtype of the products' operands and that of the sums and the state."""
    dtype = accumulation_dtype(q, k, v, beta)
    return (v.dtype if v.dtype == jnp.bfloat16 else dtype), dtype


def _forward(options, q, k, v, g, beta, initial_state, segment_ids):
    operands, dtype = _dtypes(q, k, v, beta)
    x = cut_inputs(q, k, v, g, beta, segment_ids, options, dtype)
    rows = cut_rows(q, k, v.shape[2], segment_ids, options, operands, dtype)
    local = local_terms(x.g, rows, segment_ids, options)
    inverse = unit_lower_inverse(x.beta[..., None] * local.gram)
    inverse = checkpoint_name(inverse, INVERSE)

    def step(state, chunk):
        rows, v, beta, inverse, scores, decay = chunk
        read_q, read_k = jnp.split(_read(rows, state), 2, axis=-2)
        gamma = decay.from_start[..., None]
        u = _solve(inverse, beta, v - gamma * read_k)
        o = gamma * read_q + dot("bhij,bhjv->bhiv", scores, u, u.dtype)
        return _next_state(state, rows.keys(), u, decay), o

    chunks = (rows, x.v, x.beta, inverse, local.scores, local.decay)
    state, o = jax.lax.scan(step, initial_state.astype(dtype), chunks)
    o = from_chunks(o, v.shape[1])
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return (o.astype(v.dtype), state), (q, k, v, g, beta, initial_state, segment_ids, inverse)


def _read(rows: Rows, state):
    """Returns Q S above K S, or K S alone for rows of keys."""
    return rows.factor[..., None] * dot("bhik,bhkv->bhiv", rows.qk, state, rows.qk.dtype)


def _solve(inverse, beta, error):
    """Returns U = T (β error)."""
    return dot("bhij,bhjv->bhiv", inverse, beta[..., None] * error, inverse.dtype)


def _next_state(state, keys: Rows, u, decay: Decay):
    u = (keys.factor * decay.to_end)[..., None] * u
    written = dot("bhik,bhiv->bhkv", keys.qk, u, keys.qk.dtype)
    return decay.whole[..., None, None] * state + written


def _backward(options, residuals, cotangents):
    q, k, v, g, beta, initial_state, segment_ids, inverse = residuals
    do, dstate = cotangents
    operands, dtype = _dtypes(q, k, v, beta)

    def cut(q, k, v, g, beta):
        return cut_inputs(q, k, v, g, beta, segment_ids, options, dtype)

    x, pull = jax.vjp(cut, q, k, v, g, beta)
    rows = cut_rows(q, k, v.shape[2], segment_ids, options, operands, dtype)
    local = local_terms(x.g, rows, segment_ids, options)
    do = to_chunks(do.astype(dtype), options.chunk, segment_ids)

    def rebuild(state, chunk):  # as the forward scan, without the output
        keys, v, beta, inverse, decay = chunk
        error = v - decay.from_start[..., None] * _read(keys, state)
        u = _solve(inverse, beta, error)
        return _next_state(state, keys, u, decay), (state.astype(operands), error, u)

    chunks = (rows.keys(), x.v, x.beta, inverse, local.decay)
    _, (states, error, u) = jax.lax.scan(rebuild, initial_state.astype(dtype), chunks)

    def walk_back(dstate, chunk):  # dstate: gradient of the state after the chunk
        rows, do, du, beta, inverse, decay = chunk
        du = du + decay.to_end[..., None] * _read(rows.keys(), dstate)
        dr = dot("bhji,bhjv->bhiv", inverse, du, inverse.dtype)
        gamma = decay.from_start[..., None]
        reads = jnp.concatenate([gamma * do, -beta[..., None] * gamma * dr], axis=-2)
        reads = rows.factor[..., None] * reads
        before = dot("bhik,bhiv->bhkv", rows.qk, reads, operands)
        before += decay.whole[..., None, None] * dstate
        return before, (dstate.astype(operands), dr)

    du = dot("...ji,...jv->...iv", local.scores, do, operands)  # Pᵀ dO
    chunks = (rows, do, du, x.beta, inverse, local.decay)
    dinitial, (dstates, dr) = jax.lax.scan(walk_back, dstate.astype(dtype), chunks, reverse=True)

    gradients = _chunk_gradients(x, rows, local, states, error, u, do, dr, dstates)
    return (*pull(gradients), dinitial.astype(initial_state.dtype), None)


def _chunk_gradients(x: Chunks, rows: Rows, local, states, error, u, do, dr, dstates) -> Chunks:
    """Computes the gradients of the chunks' inputs from both walks, for all chunks at once."""
    operands = rows.qk.dtype
    gamma, to_end = local.decay.from_start[..., None], local.decay.to_end[..., None]
    beta = x.beta[..., None]
    keys = rows.keys()

    outer = jnp.concatenate([do, dr], axis=-2).astype(operands)
    dscores, dgram = jnp.split(dot("...iv,...jv->...ij", outer, u, operands), 2, axis=-2)
    dgram = -strictly_lower(dgram)  # dA
    dread_q, dread_k = jnp.split(dot("...iv,...kv->...ik", outer, states, operands), 2, axis=-2)
    dread_q, dread_k = gamma * dread_q, -beta * gamma * dread_k
    dwritten = to_end * dot("...iv,...kv->...ik", u, dstates, operands)

    # dP ∘ D above M: times K for dQ and dK, and its transpose times Q above K for dK.
    between = local.decay.between
    spread = jnp.concatenate([dscores * between, beta * dgram * between], axis=-2)
    across = spread * keys.factor[..., None, :]
    across = dot("...ij,...jk->...ik", across, keys.qk, across.dtype)
    dq_local, dk_local = jnp.split(across, 2, axis=-2)
    down = dot("...ij,...ik->...jk", spread * rows.factor[..., :, None], rows.qk, operands)

    dg = decay_gradient(
        dscores * local.scores + beta * dgram * local.gram,
        jnp.sum(x.q * dread_q + x.k * dread_k, axis=-1),
        jnp.sum(x.k * dwritten, axis=-1),
        local.decay.whole
        * jnp.sum(states.astype(gamma.dtype) * dstates.astype(gamma.dtype), axis=(-2, -1)),
    )
    dbeta = jnp.sum(dr * error, axis=-1) + jnp.sum(dgram * local.gram, axis=-1)
    return Chunks(dread_q + dq_local, dread_k + dk_local + dwritten + down, beta * dr, dg, dbeta)


def _outputs(options, q, k, v, g, beta, initial_state, segment_ids):
    outputs, _ = _forward(options, q, k, v, g, beta, initial_state, segment_ids)
    return outputs


_chunked = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)
