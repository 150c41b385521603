"""The walk over chunks that KDA and the DPLR delta rule share, in plain XLA.

Per head and chunk, with the state S [K, V] before it, everything that does not depend on S is given
(Q̂, Â, B̂, T, P, R₀, γ; where there is one, a second writing K̂ᵀV):

    R = Â S + R₀        U = T R        O = Q̂ S + P U        S' = diag(γ) S + B̂ᵀ U + K̂ᵀ V

and backward, with the gradients dO and dS':

    dU = Pᵀ dO + B̂ dS'          dR = Tᵀ dU          dS = diag(γ) dS' + Q̂ᵀ dO + Âᵀ dR
    dQ̂ = dO Sᵀ    dÂ = dR Sᵀ    dB̂ = U dS'ᵀ    dK̂ = V dS'ᵀ    dV = K̂ dS'    dγ = rowsum(S ∘ dS')
    dP = dO Uᵀ    d(T⁻¹) = −dR Uᵀ    dR₀ = dR

No gradient of T itself is formed: TᵀdT Tᵀ would cancel where T's entries grow. With bfloat16
operands the products with the state are rounded, those of size C x C are not: T's entries grow and
alternate where keys resemble each other, as SiLU makes them. Layout: [N, B, H, C, ·].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.chunk_math import dot


class Terms(NamedTuple):
    """What is known of each chunk before the walk."""

    reads: Float[Array, "N B H 2C K"]  # Q̂ above Â
    writes: Float[Array, "N B H W K"]  # B̂, and K̂ below it where there are other writings
    inverse: Float[Array, "N B H C C"]  # T
    scores: Float[Array, "N B H C C"]  # P
    source: Float[Array, "N B H C V"]  # R₀
    whole: Float[Array, "N B H K"]  # γ
    values: Float[Array, "N B H C V"] | None  # V, where there are other writings


class Gradients(NamedTuple):
    """The gradients of the terms; `inverse` is that of T⁻¹."""

    reads: Float[Array, "N B H 2C K"]
    writes: Float[Array, "N B H W K"]
    inverse: Float[Array, "N B H C C"]
    scores: Float[Array, "N B H C C"]
    source: Float[Array, "N B H C V"]
    whole: Float[Array, "N B H K"]
    values: Float[Array, "N B H C V"] | None


def _read(rows, state, operands):
    return dot("...ik,...kv->...iv", rows, state, operands)


def _written(u, values):
    return u if values is None else jnp.concatenate([u, values], axis=-2)


def _next_state(state, chunk: Terms, u, operands):
    written = dot("...ik,...iv->...kv", chunk.writes, _written(u, chunk.values), operands)
    return chunk.whole[..., None] * state + written


def _solve(inverse, r):
    return dot("...ij,...jv->...iv", inverse, r, inverse.dtype)


def walk(
    terms: Terms, state: Float[Array, "B H K V"], operands: jnp.dtype
) -> tuple[Float[Array, "N B H C V"], Float[Array, "B H K V"]]:
    """Walks over the chunks.

    Args:
      terms: the chunks.
      state: the state before the first, in the dtype of the sums.
      operands: dtype that the operands of products with the state are rounded to.

    Returns:
      O and the state after the last chunk.
    """

    def step(state, chunk: Terms):
        read_q, read_a = jnp.split(_read(chunk.reads, state, operands), 2, axis=-2)
        u = _solve(chunk.inverse, read_a + chunk.source)
        o = read_q + dot("...ij,...jv->...iv", chunk.scores, u, u.dtype)
        return _next_state(state, chunk, u, operands), o

    state, o = jax.lax.scan(step, state, terms)
    return o, state


def gradients(
    terms: Terms,
    state: Float[Array, "B H K V"],
    do: Float[Array, "N B H C V"],
    dstate: Float[Array, "B H K V"],
    operands: jnp.dtype,
) -> tuple[Gradients, Float[Array, "B H K V"]]:
    """Walks again for the states before the chunks, then back.

    Args:
      terms: the chunks.
      state: the state before the first.
      do: gradient of O.
      dstate: gradient of the state after the last.
      operands: as of `walk`.

    Returns:
      The gradients of the terms, and that of the state before the first chunk.
    """

    def rebuild(state, chunk: Terms):
        _, reads = jnp.split(chunk.reads, 2, axis=-2)
        u = _solve(chunk.inverse, _read(reads, state, operands) + chunk.source)
        return _next_state(state, chunk, u, operands), (state.astype(operands), u)

    _, (states, u) = jax.lax.scan(rebuild, state, terms)

    def walk_back(dstate, chunk):  # dstate: gradient of the state after the chunk
        reads, writes, inverse, whole, do, du = chunk
        du = du + _read(writes[..., : du.shape[-2], :], dstate, operands)
        dr = dot("...ji,...jv->...iv", inverse, du, inverse.dtype)
        outer = jnp.concatenate([do, dr], axis=-2)
        before = dot("...ik,...iv->...kv", reads, outer, operands)
        return whole[..., None] * dstate + before, (dstate.astype(operands), dr)

    du = dot("...ji,...jv->...iv", terms.scores, do, do.dtype)  # Pᵀ dO
    chunks = (terms.reads, terms.writes, terms.inverse, terms.whole, do, du)
    dinitial, (dstates, dr) = jax.lax.scan(walk_back, dstate, chunks, reverse=True)

    outer = jnp.concatenate([do, dr], axis=-2)
    squares = dot("...iv,...jv->...ij", outer, u, u.dtype)
    dscores, dgram = jnp.split(squares, 2, axis=-2)
    dvalues = None
    if terms.values is not None:
        dvalues = _read(terms.writes[..., u.shape[-2] :, :], dstates, operands)
    written = _written(u, terms.values)
    wide = dr.dtype
    whole = jnp.sum(states.astype(wide) * dstates.astype(wide), axis=-1)
    found = Gradients(
        reads=dot("...iv,...kv->...ik", outer, states, operands),
        writes=dot("...iv,...kv->...ik", written, dstates, operands),
        inverse=-dgram,
        scores=dscores,
        source=dr,
        whole=whole,
        values=dvalues,
    )
    return found, dinitial
