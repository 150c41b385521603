"""The short convolution in kernels: one pass over memory forward, one backward.

Forward reads u and writes y; backward reads u and dy, computes the sum before the activation again
and writes du and, for every tile, float32 sums of dw and db, which are added outside in a fixed
order (gpu.py, tpu.py). Only the op's inputs are kept for the backward pass.

The kernels know rows of one call only. Where rows from before it matter (a tail, or another
device's rows), the first W-1 outputs are computed again outside, by xla.py.
"""

import functools
from types import ModuleType
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from kernels_pallas import backend
from kernels_pallas.conv_history import history, own_rows, replace_first_rows
from kernels_pallas.short_conv import gpu, tpu
from kernels_pallas.short_conv.blocks import choose
from kernels_pallas.short_conv.xla import shifted_sums


def short_conv_pallas(
    u: Float[Array, "B T D"],
    w: Float[Array, "W D"],
    b: Float[Array, " D"] | None,
    *,
    activation: str | None,
    tail: Float[Array, "B W-1 D"],
    has_tail: bool,
    segment_ids: Int[Array, "B T"] | None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Computes the op with the kernels.

    Raises:
      NotImplementedError: a shape or dtype that they do not take, in particular few tokens.
    """
    w, b = w.astype(u.dtype), None if b is None else b.astype(u.dtype)
    for which in ("forward", "backward"):
        choose(mover()[0], which, u.shape, u.dtype, len(w))
    past, new_tail = history(u, tail, has_tail, segment_ids, axis_name)
    weights = w if b is None else jnp.concatenate([w, b[None]])
    y = cast(jax.Array, convolved(u, weights, own_rows(u, past), len(w), activation))

    def first_rows(u, window):
        return shifted_sums(u, w, b, window, activation=activation)

    return replace_first_rows(y, (u,), past, first_rows), new_tail


def mover() -> tuple[str, ModuleType]:
    """Returns which device's way of moving data is in force, and its kernels."""
    return ("tpu", tpu) if backend.platform() == "tpu" else ("gpu", gpu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def convolved(
    u: Float[Array, "B T D"],
    weights: Float[Array, "N D"],
    seen: Int32[Array, "B T"] | None,
    width: int,
    activation: str | None,
) -> Float[Array, "B T D"]:
    """The convolution of the rows of one call.

    Args:
      u: values.
      weights: the W taps and perhaps the bias, of u's dtype.
      seen: rows before each token that are its own, -1 for padding; None is all from row 0 on.
      width: W.
      activation: "silu" or None.
    """
    return _run("forward", u, weights, seen=seen, width=width, activation=activation)


def _run(which, u, *arrays, width, **options):
    device, kernels = mover()
    blocks = choose(device, which, u.shape, u.dtype, width)
    return getattr(kernels, which)(u, *arrays, width=width, blocks=blocks, **options)


def _forward(u, weights, seen, width, activation):
    return convolved(u, weights, seen, width, activation), (u, weights, seen)


def _backward(width, activation, kept, dy):
    u, weights, seen = kept
    options = {"seen": seen, "width": width, "activation": activation}
    du, sums = _run("backward", u, weights, dy, **options)
    return du, sums.sum((0, 1)).astype(weights.dtype), None


convolved.defvjp(_forward, _backward)
