"""Splitting T: segments walk side by side, and their transitions are composed.

A stretch of tokens takes the state before it to S' = M S + N, M [K, K]. Composing (M, N) over
stretches gives the state before each, after which all can be walked at once: so a long sequence
with few heads fills a device, and a sequence split over devices needs one exchange. The backward
pass composes the mirror image, dS = Mᵀ dS' + dN. States are transposed here, [V, K], as in the
kernels; X is Mᵀ, so S'ᵀ = Sᵀ X + Nᵀ.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _multiply(state: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bhvk,bhkl->bhvl", state, x, precision="highest")


def states_before(
    x: Float[Array, "S B H K K"], n: Float[Array, "S B H V K"], first: Float[Array, "B H V K"]
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """Composes transitions.

    Args:
      x: transposed M of each stretch.
      n: transposed N of each stretch.
      first: transposed state before the first.

    Returns:
      The transposed state before each stretch, and the one after the last.
    """

    def step(state, stretch):
        x, n = stretch
        return _multiply(state, x) + n, state

    last, before = jax.lax.scan(step, first, (x, n))
    return before, last


def gradients_after(
    x: Float[Array, "S B H K K"], n: Float[Array, "S B H V K"], last: Float[Array, "B H V K"]
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """Composes the backward transitions.

    Args:
      x: transposed M of each stretch.
      n: gradient of the transposed state before each stretch through its own outputs alone.
      last: gradient of the transposed state after the last.

    Returns:
      The gradient of the transposed state after each stretch, and that of the one before the first.
    """

    def step(dstate, stretch):
        x, n = stretch
        return _multiply(dstate, jnp.swapaxes(x, -1, -2)) + n, dstate

    first, after = jax.lax.scan(step, last, (x, n), reverse=True)
    return after, first


def compose(
    x: Float[Array, "S B H K K"], n: Float[Array, "S B H V K"]
) -> tuple[Float[Array, "B H K K"], Float[Array, "B H V K"]]:
    """Composes all stretches into one transition."""
    eye = jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape[1:])
    whole, _ = jax.lax.scan(lambda total, x: (_multiply(total, x), None), eye, x)
    return whole, states_before(x, n, jnp.zeros_like(n[0]))[1]


def on_first_device(x: jax.Array, axis_name: str) -> jax.Array:
    """Returns x on the axis' first device and zeros on the others."""
    return jnp.where(jax.lax.axis_index(axis_name) == 0, x, jnp.zeros_like(x))


def over_stretches(
    x: Float[Array, "S B H K K"],
    n: Float[Array, "S B H V K"],
    first: Float[Array, "B H V K"],
    axis_name: str | None,
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """`states_before` where the stretches may go on over the devices of an axis.

    Args:
      x: transposed M of each of this device's stretches.
      n: transposed N of each.
      first: transposed state before the first device's first stretch; the others' is not used.
      axis_name: the mesh axis, or None.

    Returns:
      The transposed state before each of this device's stretches, and the one after all devices'.
    """
    if axis_name is None:
        return states_before(x, n, first)
    all_x, all_n = jax.lax.all_gather(compose(x, n), axis_name)
    first = jax.lax.psum(on_first_device(first, axis_name), axis_name)
    before, last = states_before(all_x, all_n, first)
    own = jax.lax.dynamic_index_in_dim(before, jax.lax.axis_index(axis_name), 0, False)
    return states_before(x, n, own)[0], last


def back_over_stretches(
    x: Float[Array, "S B H K K"],
    n: Float[Array, "S B H V K"],
    last: Float[Array, "B H V K"],
    axis_name: str | None,
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """`gradients_after` where the stretches may go on over the devices of an axis.

    Args:
      x: transposed M of each of this device's stretches.
      n: gradient of the transposed state before each through its own outputs alone.
      last: gradient of the transposed state after all devices' stretches; every device returned
        that state, so the gradients add up.
      axis_name: the mesh axis, or None.

    Returns:
      The gradient of the transposed state after each of this device's stretches, and that of the
      initial state, which is 0 but on the first device.
    """
    if axis_name is None:
        return gradients_after(x, n, last)
    last = jax.lax.psum(last, axis_name)
    whole = compose(x, n)[0], gradients_after(x, n, jnp.zeros_like(last))[1]
    all_x, all_n = jax.lax.all_gather(whole, axis_name)
    after, first = gradients_after(all_x, all_n, last)
    own = jax.lax.dynamic_index_in_dim(after, jax.lax.axis_index(axis_name), 0, False)
    return gradients_after(x, n, own)[0], on_first_device(first, axis_name)
