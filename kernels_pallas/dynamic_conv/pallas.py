"""The dynamic convolution with the generator's product fused: the taps never reach memory.

Forward is one kernel (gpu.py, tpu.py). Backward is one kernel that computes the taps again and
gives du, db2 and the tap gradients, then two products over those:

    dh = dtaps w2ᵀ        dw2 = hᵀ dtaps

The tap gradients are W·D values a token and do pass through memory: as operands of products over
W·D and over T they are needed by programs that share nothing. Only the op's inputs are kept for
the backward pass.

The kernels know rows of one call only. Where rows from before it matter (a tail, or another
device's rows), the first W-1 outputs are computed again outside, by xla.py.
"""

from types import ModuleType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32

from kernels_pallas import backend
from kernels_pallas.conv_history import history, own_rows, replace_first_rows
from kernels_pallas.dynamic_conv import gpu, tpu
from kernels_pallas.dynamic_conv.blocks import choose, padded_width
from kernels_pallas.dynamic_conv.xla import shifted_sums


def dynamic_conv_pallas(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w2: Float[Array, "R W D"],
    b2: Float[Array, "W D"],
    *,
    tail: Float[Array, "B W-1 D"],
    has_tail: bool,
    segment_ids: Int[Array, "B T"] | None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B W-1 D"]]:
    """Computes the op with the fused kernels.

    Raises:
      NotImplementedError: a shape or dtype that they do not take, in particular few tokens.
    """
    w2, b2 = w2.astype(u.dtype), b2.astype(u.dtype)
    _choose("forward", u, w2)
    _choose("backward", u, w2)
    past, new_tail = history(u, tail, has_tail, segment_ids, axis_name)
    v = fused(u, h, w2, b2, own_rows(u, past))

    def first_rows(u, h, window):
        return shifted_sums(u, h, w2, b2, window)

    return replace_first_rows(v, (u, h), past, first_rows), new_tail


def mover() -> tuple[str, ModuleType]:
    """Returns which device's way of moving data is in force, and its kernels."""
    return ("tpu", tpu) if backend.platform() == "tpu" else ("gpu", gpu)


def _choose(which, u, w2):
    hidden, width, channels = w2.shape
    return choose(mover()[0], which, u.dtype, u.shape[1], channels, hidden, width)


@jax.custom_vjp
def fused(
    u: Float[Array, "B T D"],
    h: Float[Array, "B T R"],
    w2: Float[Array, "R W D"],
    b2: Float[Array, "W D"],
    seen: Int32[Array, "B T"] | None,
) -> Float[Array, "B T D"]:
    """The convolution of the rows of one call, all of one dtype.

    Args:
      u: values.
      h: hidden activation.
      w2: weight.
      b2: bias.
      seen: rows before each token that are its own, -1 for padding; None is all from row 0 on.
    """
    blocks = _choose("forward", u, w2)
    h, w2 = _whole_steps(h, 2, blocks.depth), _whole_steps(w2, 0, blocks.depth)
    w, b = (_grouped(x, blocks.channels) for x in (w2, b2))
    width = padded_width(w2.shape[1])
    return mover()[1].forward(u, h, w, b, seen, width=width, blocks=blocks)


def _fused_forward(u, h, w2, b2, seen):
    return fused(u, h, w2, b2, seen), (u, h, w2, b2, seen)


def _fused_backward(kept, dv):
    u, h, w2, b2, seen = kept
    blocks, (hidden, width, _) = _choose("backward", u, w2), w2.shape
    h, w2 = _whole_steps(h, 2, blocks.depth), _whole_steps(w2, 0, blocks.depth)
    w, b = (_grouped(x, blocks.channels) for x in (w2, b2))
    run = mover()[1].backward
    du, dtaps, db = run(u, h, w, b, dv, seen, width=padded_width(width), blocks=blocks)
    dh = _product(dtaps, w, ((2,), (1,)))[..., :hidden]
    dw = _product(h, dtaps, ((0, 1), (0, 1)))[:hidden]
    dw, db = (_ungrouped(x, blocks.channels, width) for x in (dw, db.sum(0)))
    return du, dh.astype(h.dtype), dw.astype(w2.dtype), db.astype(b2.dtype), None


fused.defvjp(_fused_forward, _fused_backward)


def _product(a, b, contract):
    """Multiplies with float32 sums; float32 operands to float32 accuracy.

    Not by three TF32 passes: summed over 8,000 tokens they were off by 2e-5 on an H100.
    """
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _whole_steps(x, axis, depth):
    """Fills an axis of R with zeros up to whole steps of the kernel's product."""
    extra = -x.shape[axis] % depth if depth else 0
    if not extra:
        return x
    return jnp.pad(x, [(0, extra if i == axis else 0) for i in range(x.ndim)])


def _grouped(x, channels):
    """Orders [..., W, D] by channel tile, tap, channel, with leading taps of 0 up to a power of 2.

    Returns:
      [..., taps·D].
    """
    *lead, width, size = x.shape
    extra = padded_width(width) - width
    x = jnp.pad(x, [(0, 0)] * len(lead) + [(extra, 0), (0, 0)])
    x = x.reshape(*lead, width + extra, size // channels, channels)
    return x.swapaxes(-3, -2).reshape(*lead, -1)


def _ungrouped(x, channels, width):
    """Undoes `_grouped`."""
    *lead, size = x.shape
    taps = padded_width(width)
    x = x.reshape(*lead, size // (taps * channels), taps, channels).swapaxes(-3, -2)
    return x.reshape(*lead, taps, -1)[..., taps - width :, :]
