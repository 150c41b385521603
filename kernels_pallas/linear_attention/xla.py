"""Linear attention in chunks, in plain XLA, with its own derivative.

Equations and notation: chunks.py. What depends on one chunk alone is computed for all chunks at
once; a scan over the chunks carries the state. The backward pass keeps the inputs alone, runs the
scan again for the state before each chunk and walks back through the chunks with the state's
gradient:

    dS = e^{G_C} dS' + Q̂ᵀ dO    dV = K_e dS' + Yᵀ dO
    dQ̂ = dO Sᵀ    dK_e = V dS'ᵀ    dY = dO Vᵀ    d e^{G_C} = rowsum(S ∘ dS')

from which autodiff of `Terms` gives the gradients of q, k and g.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.gated_delta_rule.chunk_math import dot
from kernels_pallas.gated_delta_rule.chunks import from_chunks, to_chunks
from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype
from kernels_pallas.linear_attention.chunks import Options, Terms, by_group, by_head, terms_of


def linear_attention_xla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV"] | Float[Array, "B T HV K"] | None,
    *,
    scale: float | None,
    initial_state: Float[Array, "B HV K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B HV K V"]]:
    """Runs the recurrence in chunks of `chunk_size`, or fewer tokens where T is shorter."""
    if axis_name is not None:
        raise NotImplementedError("the chunked scan does not split T over devices (axis_name)")
    batch, length, heads, width = v.shape
    dtype = accumulation_dtype(q, k, v)
    if g is None:
        g = jnp.zeros((batch, length, heads), dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, k.shape[3], width), dtype)
    while chunk_size > 16 and chunk_size >= 2 * length:
        chunk_size //= 2
    factor = k.shape[3] ** -0.5 if scale is None else float(scale)
    operands = v.dtype if v.dtype == jnp.bfloat16 else dtype
    options = Options(factor, chunk_size, heads, operands, dtype)
    o, state = _chunked(options, q, k, v, g, initial_state, segment_ids)
    return o, state.astype(state_dtype)


def _rounded(terms: Terms, operands: jnp.dtype) -> Terms:
    """Rounds what only ever is an operand of products."""
    return terms._replace(
        read=terms.read.astype(operands),
        write=terms.write.astype(operands),
        scores=terms.scores.astype(operands),
    )


def _scaled(factor: jax.Array | None, rows: jax.Array) -> jax.Array:
    return rows if factor is None else factor[..., None] * rows


def _times_state(rows: jax.Array, state: jax.Array) -> jax.Array:
    """Multiplies a group's rows [B G C K] with its heads' states [B G R K V]."""
    return dot("bgck,bgrkv->bgrcv", rows, state, rows.dtype)


def _next_state(state: jax.Array, terms: Terms, v: jax.Array) -> jax.Array:
    v = _scaled(terms.write_factor, v)
    written = dot("bgck,bgrcv->bgrkv", terms.write, v, terms.write.dtype)
    return terms.whole[..., None] * state + written


def _groups(options: Options, v, initial_state, segment_ids, groups: int):
    v = by_group(to_chunks(v.astype(options.dtype), options.chunk, segment_ids), groups)
    return v, by_group(initial_state.astype(options.dtype)[None], groups)[0]


def _forward(options: Options, q, k, v, g, initial_state, segment_ids):
    residuals = q, k, v, g, initial_state, segment_ids
    terms = terms_of(options, segment_ids, g.ndim == 4)(q, k, g)
    length, dtype = v.shape[1], v.dtype
    v, state = _groups(options, v, initial_state, segment_ids, terms.read.shape[2])
    terms = _rounded(terms, options.operands)
    local = dot("...ij,...jv->...iv", terms.scores, v, options.operands)

    def step(state, chunk):
        terms, v, local = chunk
        o = _scaled(terms.read_factor, _times_state(terms.read, state)) + local
        return _next_state(state, terms, v), o.astype(dtype)

    state, o = jax.lax.scan(step, state, (terms._replace(scores=None), v, local))
    o = from_chunks(by_head(o), length)
    return (o, by_head(state[None])[0]), residuals


def _backward(options: Options, residuals, cotangents):
    q, k, v, g, initial_state, segment_ids = residuals
    do, dlast = cotangents
    length = v.shape[1]
    terms, pull = jax.vjp(terms_of(options, segment_ids, g.ndim == 4), q, k, g)
    groups = terms.read.shape[2]
    rows, state = _groups(options, v, initial_state, segment_ids, groups)
    do, dlast = _groups(options, do, dlast, segment_ids, groups)
    terms = _rounded(terms, options.operands)

    def rebuild(state, chunk):
        terms, v = chunk
        return _next_state(state, terms, v), state.astype(options.operands)

    walked = terms._replace(scores=None)
    _, states = jax.lax.scan(rebuild, state, (walked, rows))

    def walk_back(dstate, chunk):  # dstate: gradient of the state after the chunk
        terms, v, do, state = chunk
        found = _chunk_gradients(terms, v, do, state, dstate)
        do = _scaled(terms.read_factor, do)
        read = dot("bgck,bgrcv->bgrkv", terms.read, do, terms.read.dtype)
        return terms.whole[..., None] * dstate + read, found

    dfirst, (dterms, dv) = jax.lax.scan(walk_back, dlast, (walked, rows, do, states), reverse=True)
    dv += dot("...ij,...iv->...jv", terms.scores, do, options.operands)
    dscores = dot("...iv,...jv->...ij", do, rows, options.operands)
    dq, dk, dg = pull(dterms._replace(scores=dscores))
    dv = from_chunks(by_head(dv), length)
    dfirst = by_head(dfirst[None])[0].astype(initial_state.dtype)
    return dq, dk, dv.astype(v.dtype), dg, dfirst, None


def _chunk_gradients(terms: Terms, v, do, state, dstate) -> tuple[Terms, jax.Array]:
    """Computes the gradients of one chunk's `Terms` but its scores, and of V but through those.

    Args:
      terms: the chunk's, without scores.
      v: values [B G R C V].
      do: gradient of the outputs, likewise.
      state: state before the chunk [B G R K V].
      dstate: gradient of the state after the chunk.
    """
    operands = terms.read.dtype

    def of_rows(factor, values, state):  # the heads of a group add up
        return dot("bgrcv,bgrkv->bgck", _scaled(factor, values), state, operands)

    def of_factor(factor, values, through):
        return None if factor is None else jnp.sum(values * through, axis=-1)

    written = _times_state(terms.write, dstate)
    read = None if terms.read_factor is None else _times_state(terms.read, state)
    kept = jnp.sum(state.astype(dstate.dtype) * dstate, axis=-1)
    if terms.whole.shape[-1] == 1:
        kept = jnp.sum(kept, axis=-1, keepdims=True)
    gradients = Terms(
        of_rows(terms.read_factor, do, state),
        of_factor(terms.read_factor, do, read),
        of_rows(terms.write_factor, v, dstate),
        of_factor(terms.write_factor, v, written),
        None,
        kept,
    )
    return gradients, _scaled(terms.write_factor, written)


def _outputs(options: Options, q, k, v, g, initial_state, segment_ids):
    return _forward(options, q, k, v, g, initial_state, segment_ids)[0]


_chunked = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)
