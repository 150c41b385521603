"""The public function: checks, defaults and the choice of implementation."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kernels_pallas.checks import check_array, check_same_dtype, check_segment_ids
from kernels_pallas.conv_history import check_tail
from kernels_pallas.dispatch import dispatch
from kernels_pallas.dynamic_conv.pallas import dynamic_conv_pallas
from kernels_pallas.dynamic_conv.reference import dynamic_conv_reference
from kernels_pallas.dynamic_conv.xla import dynamic_conv_xla

IMPLEMENTATIONS = {
    "pallas": dynamic_conv_pallas,
    "xla": dynamic_conv_xla,
    "reference": dynamic_conv_reference,
}


def dynamic_conv(
    u: ArrayLike,
    h: ArrayLike,
    w2: ArrayLike,
    b2: ArrayLike,
    *,
    tail: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolves each channel causally with taps generated for the output token, then SiLU.

        taps[t, j, c] = sum_r h[t, r] w2[r, j, c] + b2[j, c]
        v[t, c]       = silu(sum_j taps[t, j, c] u[t - (W-1) + j, c])

    (The dynamic convolution of JetBlock, Gu et al., "Jet-Nemotron", arXiv:2508.15884.) Values
    before a segment's start are 0. Taps and values are rounded to u's dtype, sums are kept in
    float32. Differentiable in all floating-point arguments.

    Memory kept for the backward pass: "pallas" and "xla" their inputs only (the taps, W·D values
    a token, are computed again); "reference" the taps and W rows a token. While it runs, the
    backward pass of "pallas" holds the W·D tap gradients a token in u's dtype.

    Args:
      u: values [B, T, D], before any activation.
      h: the generator's hidden activation [B, T, R], of the same dtype.
      w2: the generator's output weight [R, W, D]; cast to u's dtype.
      b2: its bias, the static taps [W, D]; cast to u's dtype.
      tail: the last W-1 rows of u before this call, oldest first [B, W-1, D]; None is zeros.
      segment_ids: [B, T] integers, 0 for padding. Each segment (a maximal run of one non-zero
        id) starts from zeros but the first of the row, which continues `tail`. Padding leaves the
        tail untouched, and v is 0 there.
      axis_name: axis of the caller's `shard_map` over which T is split, in order. The devices
        exchange W-1 rows; `tail`, in and out, is the same on all of them.
      implementation: "reference" (token by token), "xla" (shifted sums), "pallas" (one kernel with
        the product; interpreted on a CPU), or None for the fastest that takes the arguments.

    Returns:
      v [B, T, D] in u's dtype, and the new tail [B, W-1, D] in the tail's dtype (u's if None):
      the last W-1 real rows of the row's last segment, with zeros or the old tail before them.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation, fewer than W-1
        tokens a device under `axis_name`.
      NotImplementedError: no implementation takes the arguments.
    """
    u, h, w2, b2 = (jnp.asarray(x) for x in (u, h, w2, b2))
    sizes: dict[str, int] = {}
    check_array(sizes, "u", u, "B T D")
    check_array(sizes, "h", h, "B T R")
    check_array(sizes, "w2", w2, "R W D")
    check_array(sizes, "b2", b2, "W D")
    check_same_dtype(u=u, h=h)
    if sizes["T"] == 0 or sizes["W"] < 2:
        raise ValueError(
            f"T={sizes['T']} tokens and W={sizes['W']} taps, expected T >= 1 and W >= 2"
        )
    tail, has_tail = check_tail(sizes, u, tail)
    if segment_ids is not None:
        segment_ids = jnp.asarray(segment_ids)
        check_segment_ids(sizes, segment_ids)
    return dispatch(
        "dynamic_conv",
        IMPLEMENTATIONS,
        implementation,
        u,
        h,
        w2,
        b2,
        tail=tail,
        has_tail=has_tail,
        segment_ids=segment_ids,
        axis_name=axis_name,
    )
