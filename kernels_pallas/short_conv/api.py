"""The public function: checks, defaults and the choice of implementation."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.checks import check_array, check_segment_ids
from kernels_pallas.conv_history import check_tail
from kernels_pallas.dispatch import dispatch
from kernels_pallas.short_conv.pallas import short_conv_pallas
from kernels_pallas.short_conv.reference import short_conv_reference
from kernels_pallas.short_conv.xla import short_conv_xla

IMPLEMENTATIONS = {
    "pallas": short_conv_pallas,
    "xla": short_conv_xla,
    "reference": short_conv_reference,
}
ACTIVATIONS = (None, "silu")


def short_conv(
    u: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    activation: str | None = "silu",
    tail: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves each channel causally with its own W taps.

        y[t, c] = activation(sum_j w[j, c] u[t - (W-1) + j, c] + b[c])

    (The short convolution before the mixers of Mamba, arXiv:2312.00752, and of most linear
    attention since.) Values before a segment's start are 0. Weights are rounded to u's dtype, sums
    are kept in float32. Differentiable in all floating-point arguments. Memory kept for the
    backward pass: the inputs ("reference": W rows a token).

    Args:
      u: values [B, T, D].
      w: taps [W, D], the current token's last; cast to u's dtype.
      b: bias [D]; cast to u's dtype.
      activation: "silu" or None.
      tail: the last W-1 rows of u before this call, oldest first [B, W-1, D]; None is zeros.
      segment_ids: [B, T] integers, 0 for padding. Each segment (a maximal run of one non-zero
        id) starts from zeros but the first of the row, which continues `tail`. Padding leaves the
        tail untouched, and y is 0 there.
      axis_name: axis of the caller's `shard_map` over which T is split, in order. The devices
        exchange W-1 rows; `tail`, in and out, is the same on all of them.
      implementation: "reference" (token by token), "xla" (shifted sums), "pallas" (a kernel a pass,
        for D a multiple of 16, W <= 8 and T >= 16; interpreted on a CPU), or None for the fastest
        that takes the arguments.

    Returns:
      y [B, T, D] in u's dtype, and the new tail [B, W-1, D] in the tail's dtype (u's if None):
      the last W-1 real rows of the row's last segment, with zeros or the old tail before them.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown activation or implementation, fewer
        than W-1 tokens a device under `axis_name`.
      NotImplementedError: no implementation takes the arguments.
    """
    u, w = jnp.asarray(u), jnp.asarray(w)
    sizes: dict[str, int] = {}
    check_array(sizes, "u", u, "B T D")
    check_array(sizes, "w", w, "W D")
    if b is not None:
        b = jnp.asarray(b)
        check_array(sizes, "b", b, "D")
    if sizes["T"] == 0 or sizes["W"] < 2:
        raise ValueError(
            f"T={sizes['T']} tokens and W={sizes['W']} taps, expected T >= 1 and W >= 2"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; use 'silu' or None")
    tail, has_tail = check_tail(sizes, u, tail)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        check_segment_ids(sizes, segment_ids)
    return dispatch(
        "short_conv",
        IMPLEMENTATIONS,
        implementation,
        u,
        w,
        b,
        activation=activation,
        tail=tail,
        has_tail=has_tail,
        segment_ids=segment_ids,
        axis_name=axis_name,
    )
