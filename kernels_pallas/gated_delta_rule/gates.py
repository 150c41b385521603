"""Decays and writing strengths for the kernels: small arrays [B, HV, N, C], made by XLA.

Segments and padding end here. A segment's first token gets the log decay `BORDER`, whose factor is
exactly 0 in float32, so nothing passes from one segment into the next; padding gets β = 0 and no
decay, so it changes nothing. The kernels know of neither.

G_i − G_j loses the small decays behind a large one if the running sum G is rounded. So g is split
into a part on a grid so coarse that sums of it are exact, and a rest too small to lose anything.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kernels_pallas.segments import segment_ordinals

BORDER = -120.0  # e^-120 is 0 in float32
GRID = 2.0**11  # sums of 64 numbers down to -120 on this grid fit float32's 24 bits


class GateRows(NamedTuple):
    """Rows of every chunk [B, HV, N, C], float32; in a kernel references to a chunk's or more."""

    coarse: Any  # running sum of the decays' coarse parts
    fine: Any  # running sum of the rests
    beta: Any
    from_start: Any  # γ
    to_end: Any  # ε


def bordered(
    g: Float[Array, "B T HV"] | None,
    beta: Float[Array, "B T HV"],
    segment_ids: Int[Array, "B T"] | None,
    ordinals: Int[Array, "B T"] | None = None,
    before: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T HV"], Float[Array, "B T HV"]]:
    """Puts segments and padding into g and beta; both float32.

    Args:
      g: log decays, or None.
      beta: writing strengths.
      segment_ids: 0 for padding, or None.
      ordinals: number of each token's segment in its row, where the row goes on over several
        devices; None counts from this row's start.
      before: number of the segment before the first token; None is 0, that of an initial state.

    Returns:
      g and beta.
    """
    g = jnp.zeros(beta.shape, jnp.float32) if g is None else g.astype(jnp.float32)
    beta = beta.astype(jnp.float32)
    if segment_ids is None:
        return g, beta
    real = (segment_ids != 0)[..., None]
    g, beta = jnp.where(real, g, 0.0), jnp.where(real, beta, 0.0)
    return jnp.where(is_border(segment_ids, ordinals, before)[..., None], BORDER, g), beta


def is_border(
    segment_ids: Int[Array, "B T"],
    ordinals: Int[Array, "B T"] | None = None,
    before: Int[Array, " B"] | None = None,
) -> Bool[Array, "B T"]:
    """Returns True where a segment other than the row's first one begins."""
    ordinals = segment_ordinals(segment_ids) if ordinals is None else ordinals
    before = jnp.zeros(ordinals.shape[0], ordinals.dtype) if before is None else before
    return jnp.diff(ordinals, axis=1, prepend=before[:, None]) > 0


def to_rows(x: Float[Array, "B T HV"], chunk: int) -> Float[Array, "B HV N C"]:
    """Cuts T, a multiple of `chunk`, into rows."""
    batch, length, heads = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch, heads, length // chunk, chunk)


def from_rows(x: Float[Array, "B HV N C"]) -> Float[Array, "B T HV"]:
    """Joins the rows again."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1), 1, 2)


def gate_rows(g: Float[Array, "B T HV"], beta: Float[Array, "B T HV"], chunk: int) -> GateRows:
    """Computes the kernels' gates.

    Args:
      g: log decays with borders, float32.
      beta: writing strengths, float32.
      chunk: tokens a chunk; T is a multiple.

    Returns:
      The rows.
    """
    g, beta = to_rows(jnp.maximum(g, BORDER), chunk), to_rows(beta, chunk)
    coarse = jnp.round(g * GRID) / GRID
    coarse, fine = _running_sum(coarse), _running_sum(g - coarse)
    to_end = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    return GateRows(coarse, fine, beta, jnp.exp(coarse + fine), jnp.exp(to_end))


def _running_sum(x: jax.Array, *, backward: bool = False, without_own: bool = False) -> jax.Array:
    """Sums along the last axis up to (`backward`: from) each entry."""
    ones = jnp.tri(x.shape[-1], k=-1 if without_own else 0, dtype=x.dtype)  # [t, i], i <= t
    return jnp.einsum("ti,...i->...t", ones.T if backward else ones, x, precision="highest")


def decay_gradient(
    gates: GateRows,
    pairs: Float[Array, "B HV N C"],
    from_start: Float[Array, "B HV N C"],
    to_write: Float[Array, "B HV N C"],
    states: Float[Array, "B HV N"],
) -> Float[Array, "B HV N C"]:
    """Sums the gradients of the log decays of the factors whose span covers each row.

    Args:
      gates: the gates.
      pairs: row sums less column sums of the gradient of log D.
      from_start: gradient of log γ.
      to_write: gradient of log ε, divided by β.
      states: <S, dS'>, from before each chunk and after it.

    Returns:
      The gradient of g.
    """
    whole = gates.from_start[..., -1] * states
    after = _running_sum(pairs + from_start, backward=True)
    before = _running_sum(gates.beta * to_write, without_own=True)
    return after + before + whole[..., None]
