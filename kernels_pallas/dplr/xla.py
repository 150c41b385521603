"""The diagonal plus low-rank delta rule in chunks, in plain XLA, with its own derivative.

With G the running sum of g inside a chunk, C its last row and S the state before it:

    Q̂ = q e^G    Â_t = a_t e^{G_{t-1}}    K_e = k e^{G_C − G}    B_e = b e^{G_C − G}    γ = e^{G_C}
    A_qk, A_qb = tril(Σ_i q_ti (k | b)_ji e^{G_ti − G_ji})
    A_ak, A_ab = stril(Σ_i a_ti (k | b)_ji e^{G_{t-1},i − G_ji})
    T = (I − A_ab)^-1                 U = T (Â S + A_ak V)        (U: the rows aᵀS)
    O = Q̂ S + A_qk V + A_qb U         S' = γ S + K_eᵀ V + B_eᵀ U

The walk over the chunks and back is delta_walk.py, with P = A_qb and R₀ = A_ak V; everything else
is done for all chunks at once (vector_decay.py), and its gradients are pulled back by JAX. The
backward pass keeps the inputs and T, C values a token and head; it rebuilds one state a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels_pallas.delta_walk import Terms, gradients, walk
from kernels_pallas.gated_delta_rule.chunk_math import dot, strictly_lower, unit_lower_inverse
from kernels_pallas.gated_delta_rule.chunks import from_chunks, to_chunks
from kernels_pallas.gated_delta_rule.gates import is_border
from kernels_pallas.gated_delta_rule.inputs import accumulation_dtype
from kernels_pallas.vector_decay import decay_factors, pair_scores, with_borders

INVERSE = "dplr_delta_rule_inverse"  # the name that remat policies know T by


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float
    chunk: int  # C


class Local(NamedTuple):
    """What one chunk alone determines, but for T."""

    reads: Float[Array, "N B H 2C K"]  # Q̂ above Â
    writes: Float[Array, "N B H 2C K"]  # B_e above K_e
    whole: Float[Array, "N B H K"]  # γ
    values: Float[Array, "N B H C V"]
    source: Float[Array, "N B H C V"]  # A_ak V
    output: Float[Array, "N B H C V"]  # A_qk V
    lower: Float[Array, "N B H C C"]  # −A_ab
    scores: Float[Array, "N B H C C"]  # A_qb


def dplr_xla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    g: Float[Array, "B T H K"],
    *,
    scale: float,
    initial_state: Float[Array, "B H K V"] | None,
    segment_ids: Int[Array, "B T"] | None,
    state_dtype: jnp.dtype,
    chunk_size: int,
    axis_name: str | None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """Runs the recurrence in chunks of `chunk_size`, or fewer tokens where T is shorter."""
    if axis_name is not None:
        raise NotImplementedError("the chunked scan does not split T over devices (axis_name)")
    if initial_state is None:
        dtype = accumulation_dtype(q, k, v, a, b, g)
        initial_state = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), dtype)
    while chunk_size > 16 and chunk_size >= 2 * v.shape[1]:
        chunk_size //= 2
    options = Options(scale, chunk_size)
    o, state = _chunked(options, q, k, v, a, b, g, initial_state, segment_ids)
    return o, state.astype(state_dtype)


def _dtypes(*inputs) -> tuple[jnp.dtype, jnp.dtype]:
    """Returns the dtype of the products' operands and that of the sums and the state."""
    dtype, given = accumulation_dtype(*inputs), inputs[0].dtype
    return (given if given == jnp.bfloat16 else dtype), dtype


def _local(options: Options, q, k, v, a, b, g, segment_ids) -> Local:
    _, dtype = _dtypes(q, k, v, a, b, g)
    q, k, v, a, b, g = (x.astype(dtype) for x in (options.scale * q, k, v, a, b, g))
    if segment_ids is not None:
        # a reads the state before the decay that ends a segment, but a new segment has none yet.
        a = jnp.where(is_border(segment_ids)[..., None, None], 0, a)
    g = to_chunks(with_borders(g, segment_ids), options.chunk, None)
    q, k, v, a, b = (to_chunks(x, options.chunk, segment_ids) for x in (q, k, v, a, b))
    decay = decay_factors(g)
    rows, others = jnp.stack([q, a], axis=-3), jnp.stack([k, b], axis=-3)
    # In full: the inverse amplifies what rounding would do to products of a and b.
    pairs = pair_scores(rows, others, g, before=(False, True), operands=dtype)
    by_value = dot("...rij,...jv->...riv", pairs[..., 0, :, :], v, dtype)
    return Local(
        reads=jnp.concatenate([decay.from_start * q, decay.before * a], axis=-2),
        writes=jnp.concatenate([decay.to_end * b, decay.to_end * k], axis=-2),
        whole=decay.whole,
        values=v,
        source=by_value[..., 1, :, :],
        output=by_value[..., 0, :, :],
        lower=-strictly_lower(pairs[..., 1, 1, :, :]),
        scores=pairs[..., 0, 1, :, :],
    )


def _terms(x: Local, inverse) -> Terms:
    return Terms(x.reads, x.writes, inverse, x.scores, x.source, x.whole, x.values)


def _forward(options, q, k, v, a, b, g, initial_state, segment_ids):
    inputs = (q, k, v, a, b, g)
    operands, dtype = _dtypes(*inputs)
    local = _local(options, *inputs, segment_ids)
    inverse = checkpoint_name(unit_lower_inverse(local.lower), INVERSE)
    o, state = walk(_terms(local, inverse), initial_state.astype(dtype), operands)
    o = from_chunks(o + local.output, v.shape[1])
    if segment_ids is not None:
        o = jnp.where((segment_ids != 0)[..., None, None], o, 0)
    return (o.astype(v.dtype), state), (*inputs, initial_state, segment_ids, inverse)


def _backward(options, residuals, cotangents):
    *inputs, initial_state, segment_ids, inverse = residuals
    do, dstate = cotangents
    operands, dtype = _dtypes(*inputs)
    local, pull = jax.vjp(lambda *x: _local(options, *x, segment_ids=segment_ids), *inputs)
    do = to_chunks(do.astype(dtype), options.chunk, segment_ids)
    state = initial_state.astype(dtype)
    d, dinitial = gradients(_terms(local, inverse), state, do, dstate.astype(dtype), operands)
    assert d.values is not None
    dlocal = Local(d.reads, d.writes, d.whole, d.values, d.source, do, d.inverse, d.scores)
    return (*pull(dlocal), dinitial.astype(initial_state.dtype), None)


def _outputs(options, q, k, v, a, b, g, initial_state, segment_ids):
    outputs, _ = _forward(options, q, k, v, a, b, g, initial_state, segment_ids)
    return outputs


_chunked = jax.custom_vjp(_outputs, nondiff_argnums=(0,))
_chunked.defvjp(_forward, _backward)
