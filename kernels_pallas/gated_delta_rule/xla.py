"""The gated delta rule in chunks, in plain XLA, with its own derivative.

Equations: chunk_math.py. What depends on one chunk alone (decay factors, QKᵀ, KKᵀ, the inverse T)
is computed for all chunks at once; a scan over the chunks carries the state. The backward pass
keeps the inputs and T, runs the scan again for the state before each chunk, walks back through
the chunks for dS, and computes all other gradients for all chunks at once.

Layout inside: [N, B, HV, C, ·] with N chunks first, for the scans. Keys and queries are stacked
along rows ("qk", [.., 2C, K]) where both meet the same matrix.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Int32

from kernels_pallas.gated_delta_rule.chunk_math import (
    Decay,
    decay_factors,
    decay_gradient,
    dot,
    strictly_lower,
    unit_lower_inverse,
)
from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype, prepare_queries_keys
from kernels_pallas.segments import segment_ordinals

INVERSE = "gated_delta_rule_inverse"  # the name that remat policies know T by


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float | None
    use_qk_l2norm: bool
    chunk: int


class Chunks(NamedTuple):
    """The inputs cut into chunks, in the dtype of the sums."""

    q: Float[Array, "N B HV C K"]
    k: Float[Array, "N B HV C K"]
    v: Float[Array, "N B HV C V"]
    g: Float[Array, "N B HV C"]
    beta: Float[Array, "N B HV C"]


class Local(NamedTuple):
    """What one chunk alone determines."""

    decay: Decay
    gram: Float[Array, "N B HV C C"]  # KKᵀ ∘ D below the diagonal
    scores: Float[Array, "N B HV C C"]  # P


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
    batch, length, heads, width = v.shape
    if g is None:
        g = jnp.zeros(beta.shape, accumulation_dtype(beta))
    if initial_state is None:
        dtype = accumulation_dtype(q, k, v, beta)
        initial_state = jnp.zeros((batch, heads, k.shape[-1], width), dtype)
    while chunk_size > 16 and chunk_size >= 2 * length:
        chunk_size //= 2
    options = Options(scale, use_qk_l2norm, chunk_size)
    o, state = _chunked(options, q, k, v, g, beta, initial_state, segment_ids)
    return o, state.astype(state_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(options, q, k, v, g, beta, initial_state, segment_ids):
    outputs, _ = _forward(options, q, k, v, g, beta, initial_state, segment_ids)
    return outputs


def _to_chunks(x: Float[Array, "B T HV *D"], chunk: int) -> Float[Array, "N B HV C *D"]:
    """Pads T with zeros, which change nothing, and cuts it into chunks."""
    batch, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, -1, chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def _prepare(q, k, v, g, beta, segment_ids, options: Options, dtype) -> Chunks:
    """Normalises, silences padding and cuts into chunks; differentiated by autodiff."""
    q, k = prepare_queries_keys(
        q,
        k,
        num_value_heads=v.shape[2],
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        dtype=dtype,
    )
    arrays = Chunks(q, k, v.astype(dtype), g.astype(dtype), beta.astype(dtype))
    if segment_ids is not None:
        is_real = segment_ids != 0
        arrays = jax.tree.map(
            lambda x: jnp.where(is_real.reshape(is_real.shape + (1,) * (x.ndim - 2)), x, 0), arrays
        )
    return jax.tree.map(lambda x: _to_chunks(x, options.chunk), arrays)


def _chunk_segments(
    segment_ids: Int[Array, "B T"] | None, chunk: int
) -> tuple[Int32[Array, "N B 1 C"] | None, Int32[Array, "N B 1"] | None]:
    """Returns each row's segment number and that of the state before each chunk."""
    if segment_ids is None:
        return None, None
    ordinals = segment_ordinals(segment_ids)
    batch, length = ordinals.shape
    ordinals = jnp.pad(ordinals, ((0, 0), (0, -length % chunk)), mode="edge")
    ordinals = jnp.moveaxis(ordinals.reshape(batch, -1, chunk), 1, 0)
    before = jnp.pad(ordinals[:-1, :, -1], ((1, 0), (0, 0)))
    return ordinals[:, :, None], before[:, :, None]


def _local(x: Chunks, segment_ids, options: Options, operands) -> Local:
    segments, before = _chunk_segments(segment_ids, options.chunk)
    decay = decay_factors(x.g, segments, before)
    products = dot("...ik,...jk->...ij", jnp.concatenate([x.q, x.k], axis=-2), x.k, operands)
    queries, keys = jnp.split(products, 2, axis=-2)
    return Local(decay, strictly_lower(keys * decay.between), queries * decay.between)


def _operand_dtype(v: jax.Array) -> jnp.dtype:
    return v.dtype if v.dtype == jnp.bfloat16 else jnp.promote_types(v.dtype, jnp.float32)


def _stack(a: jax.Array, b: jax.Array, operands) -> jax.Array:
    return jnp.concatenate([a.astype(operands), b.astype(operands)], axis=-2)


def _forward(options, q, k, v, g, beta, initial_state, segment_ids):
    operands = _operand_dtype(v)
    dtype = accumulation_dtype(q, k, v, beta)
    x = _prepare(q, k, v, g, beta, segment_ids, options, dtype)
    local = _local(x, segment_ids, options, operands)
    inverse = unit_lower_inverse(x.beta[..., None] * local.gram).astype(operands)
    inverse = checkpoint_name(inverse, INVERSE)

    def step(state, chunk):
        qk, v, beta, inverse, scores, decay = chunk
        read_q, read_k = jnp.split(dot("bhik,bhkv->bhiv", qk, state, operands), 2, axis=-2)
        gamma = decay.from_start[..., None]
        u = dot("bhij,bhjv->bhiv", inverse, beta[..., None] * (v - gamma * read_k), operands)
        o = gamma * read_q + dot("bhij,bhjv->bhiv", scores, u, operands)
        return _next_state(state, qk[..., options.chunk :, :], u, decay, operands), o

    chunks = (_stack(x.q, x.k, operands), x.v, x.beta, inverse, local.scores, local.decay)
    state, o = jax.lax.scan(step, initial_state.astype(dtype), chunks)
    o = jnp.moveaxis(jnp.moveaxis(o, 2, 3), 0, 1).reshape(v.shape[0], -1, *v.shape[2:])
    o = o[:, : v.shape[1]]
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return (o.astype(v.dtype), state), (q, k, v, g, beta, initial_state, segment_ids, inverse)


def _next_state(state, k, u, decay: Decay, operands):
    written = dot("bhik,bhiv->bhkv", k, decay.to_end[..., None] * u, operands)
    return decay.whole[..., None, None] * state + written


def _backward(options, residuals, cotangents):
    q, k, v, g, beta, initial_state, segment_ids, inverse = residuals
    do, dstate = cotangents
    operands = _operand_dtype(v)
    dtype = accumulation_dtype(q, k, v, beta)
    x, pull = jax.vjp(
        lambda *inputs: _prepare(*inputs, segment_ids, options, dtype), q, k, v, g, beta
    )
    local = _local(x, segment_ids, options, operands)
    decay = local.decay
    do = do.astype(dtype)
    if segment_ids is not None:
        do = jnp.where((segment_ids != 0)[..., None, None], do, 0)
    do = _to_chunks(do, options.chunk)
    gamma, to_end = decay.from_start[..., None], decay.to_end[..., None]
    beta = x.beta[..., None]
    qk = _stack(x.q, x.k, operands)

    def rebuild(state, chunk):  # as the forward scan, without the output
        qk, v, beta, inverse, decay = chunk
        k = qk[..., options.chunk :, :]
        read = dot("bhik,bhkv->bhiv", k, state, operands)
        error = v - decay.from_start[..., None] * read
        u = dot("bhij,bhjv->bhiv", inverse, beta[..., None] * error, operands)
        return _next_state(state, k, u, decay, operands), (state.astype(operands), error, u)

    chunks = (qk, x.v, x.beta, inverse, decay)
    _, (states, error, u) = jax.lax.scan(rebuild, initial_state.astype(dtype), chunks)

    def walk_back(dstate, chunk):  # dstate: gradient of the state after the chunk
        qk, inverse, do, du, beta, decay = chunk
        k = qk[..., options.chunk :, :]
        du = du + decay.to_end[..., None] * dot("bhik,bhkv->bhiv", k, dstate, operands)
        dr = dot("bhji,bhjv->bhiv", inverse, du, operands)
        gamma = decay.from_start[..., None]
        rows = _stack(gamma * do, -beta[..., None] * gamma * dr, operands)
        before = dot("bhik,bhiv->bhkv", qk, rows, operands)
        before = before + decay.whole[..., None, None] * dstate
        return before, (dstate.astype(operands), dr)

    du = dot("...ji,...jv->...iv", local.scores, do, operands)  # Pᵀ dO
    chunks = (qk, inverse, do, du, x.beta, decay)
    dinitial, (dstates, dr) = jax.lax.scan(walk_back, dstate.astype(dtype), chunks, reverse=True)

    rows = _stack(do, dr, operands)  # [dO; dR]
    dscores, dgram = jnp.split(dot("...iv,...jv->...ij", rows, u, operands), 2, axis=-2)
    dgram = -strictly_lower(dgram)  # dA
    dread_q, dread_k = jnp.split(dot("...iv,...kv->...ik", rows, states, operands), 2, axis=-2)
    dread_q, dread_k = gamma * dread_q, -beta * gamma * dread_k
    dwritten = to_end * dot("...iv,...kv->...ik", u, dstates, operands)
    # (dP ∘ D) and M stacked, against K by columns for dQ, dK and against [Q; K] by rows for dK.
    spread = _stack(dscores * decay.between, beta * dgram * decay.between, operands)
    dq_local, dk_local = jnp.split(dot("...ij,...jk->...ik", spread, x.k, operands), 2, axis=-2)
    dk = dread_k + dk_local + dwritten + dot("...ij,...ik->...jk", spread, qk, operands)
    dbeta = jnp.sum(dr * error, axis=-1) + jnp.sum(dgram * local.gram, axis=-1)
    dg = decay_gradient(
        dscores * local.scores + dgram * beta * local.gram,
        jnp.sum(x.q * dread_q + x.k * dread_k, axis=-1),
        jnp.sum(x.k * dwritten, axis=-1),
        decay.whole * jnp.sum(states.astype(dtype) * dstates.astype(dtype), axis=(-2, -1)),
    )
    inputs = pull(Chunks(dread_q + dq_local, dk, beta * dr, dg, dbeta))
    return (*inputs, dinitial.astype(initial_state.dtype), None)


_chunked.defvjp(_forward, _backward)
