"""The inputs of the gated delta rule cut into chunks, and what one chunk alone determines.

Layout: [N, B, HV, C, ·], chunks first, for the scans over them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from kernels_pallas.gated_delta_rule.chunk_math import (
    Decay,
    decay_factors,
    dot,
    strictly_lower,
)
from kernels_pallas.gated_delta_rule.inputs import prepare_queries_keys, repeat_heads, row_factors
from kernels_pallas.segments import segment_ordinals


class Options(NamedTuple):
    """What is fixed at trace time."""

    scale: float | None
    use_qk_l2norm: bool
    chunk: int  # C


class Chunks(NamedTuple):
    """The inputs in chunks, in the dtype of the sums, queries and keys normalised."""

    q: Float[Array, "N B HV C K"]
    k: Float[Array, "N B HV C K"]
    v: Float[Array, "N B HV C V"]
    g: Float[Array, "N B HV C"]
    beta: Float[Array, "N B HV C"]


class Rows(NamedTuple):
    """Queries above keys, as given, and the factors that normalise them.

    A product takes the rows as they were given, which need no rounding, and the factors are
    applied to its other operand or to its result: rounding normalised keys to bfloat16 would be
    the largest error where keys resemble each other.
    """

    qk: Float[Array, "N B HV 2C K"]
    factor: Float[Array, "N B HV 2C"]

    def keys(self) -> "Rows":
        """Returns the lower half, the keys alone."""
        size = self.factor.shape[-1] // 2
        return Rows(self.qk[..., size:, :], self.factor[..., size:])


class Local(NamedTuple):
    """What one chunk alone determines."""

    decay: Decay
    gram: Float[Array, "N B HV C C"]  # KKᵀ ∘ D below the diagonal
    scores: Float[Array, "N B HV C C"]  # P


def to_chunks(
    x: Float[Array, "B T HV *D"], chunk: int, segment_ids: Int[Array, "B T"] | None
) -> Float[Array, "N B HV C *D"]:
    """Zeroes padding, pads T with zeros, which change nothing, and cuts it into chunks."""
    if segment_ids is not None:
        x = jnp.where((segment_ids != 0).reshape(x.shape[:2] + (1,) * (x.ndim - 2)), x, 0)
    batch, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % chunk)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, -1, chunk, *x.shape[2:])
    return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)


def from_chunks(x: Float[Array, "N B HV C V"], length: int) -> Float[Array, "B T HV V"]:
    """Joins the chunks again and cuts T to `length`."""
    x = jnp.moveaxis(jnp.moveaxis(x, 2, 3), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def cut_inputs(q, k, v, g, beta, segment_ids, options: Options, dtype: jnp.dtype) -> Chunks:
    """Returns the inputs in chunks. Plain operations, so that autodiff pulls gradients back."""
    q, k = prepare_queries_keys(
        q,
        k,
        num_value_heads=v.shape[2],
        scale=options.scale,
        use_qk_l2norm=options.use_qk_l2norm,
        dtype=dtype,
    )
    arrays = Chunks(q, k, v.astype(dtype), g.astype(dtype), beta.astype(dtype))
    return jax.tree.map(lambda x: to_chunks(x, options.chunk, segment_ids), arrays)


def cut_rows(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    num_value_heads: int,
    segment_ids: Int[Array, "B T"] | None,
    options: Options,
    operands: jnp.dtype,
    dtype: jnp.dtype,
) -> Rows:
    """Returns queries and keys in chunks, rows of dtype `operands` and factors of `dtype`."""
    factors = row_factors(
        q, k, scale=options.scale, use_qk_l2norm=options.use_qk_l2norm, dtype=dtype
    )

    def stacked(pair, axis):
        pair = [repeat_heads(x, num_value_heads) for x in pair]
        pair = [to_chunks(x, options.chunk, segment_ids) for x in pair]
        return jnp.concatenate(pair, axis=axis)

    rows = stacked((q.astype(operands), k.astype(operands)), -2)
    return Rows(rows, stacked([x[..., None] for x in factors], -2)[..., 0])


def _segments(
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


def local_terms(
    g: Float[Array, "N B HV C"],
    rows: Rows,
    segment_ids: Int[Array, "B T"] | None,
    options: Options,
) -> Local:
    """Computes decay factors and the products of rows with keys, for all chunks at once."""
    segments, before = _segments(segment_ids, options.chunk)
    decay = decay_factors(g, segments, before)
    keys = rows.keys()
    products = dot("...ik,...jk->...ij", rows.qk, keys.qk, rows.qk.dtype)
    products *= rows.factor[..., :, None] * keys.factor[..., None, :]
    by_query, by_key = jnp.split(products, 2, axis=-2)
    return Local(decay, strictly_lower(by_key * decay.between), by_query * decay.between)
