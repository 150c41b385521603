"""Composing stretches of T: each takes the state before it to S' = diag(w) S + N.

So a long sequence with few heads fills a device, and a sequence split over devices needs one
exchange. States are transposed, [V, K], as in the kernels, and w is [K], or [1] for one decay a
head. The backward pass composes the mirror image, dS = diag(w) dS' + dN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_pallas.gated_delta_rule.compose import on_first_device


def states_before(
    w: Float[Array, "S B H #K"], n: Float[Array, "S B H V K"], first: Float[Array, "B H V K"]
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """Composes transitions.

    Args:
      w: decay of each stretch.
      n: transposed N of each stretch.
      first: transposed state before the first.

    Returns:
      The transposed state before each stretch, and the one after the last. With w and N in reverse
      order, the gradients of states in place of the states.
    """

    def step(state, stretch):
        w, n = stretch
        return state * w[..., None, :] + n, state

    last, before = jax.lax.scan(step, first, (w, n))
    return before, last


def gradients_after(
    w: Float[Array, "S B H #K"], n: Float[Array, "S B H V K"], last: Float[Array, "B H V K"]
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """Composes backward transitions: as `states_before`, from the last stretch to the first."""
    after, first = states_before(w[::-1], n[::-1], last)
    return after[::-1], first


def states_over_devices(
    w: Float[Array, "S B H #K"],
    n: Float[Array, "S B H V K"],
    first: Float[Array, "B H V K"],
    axis_name: str,
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """`states_before` where the stretches go on over the devices of an axis.

    Args:
      w: decay of each of this device's stretches.
      n: transposed N of each.
      first: transposed state before the first device's first stretch; the others' is not used.
      axis_name: the mesh axis.

    Returns:
      The transposed state before each of this device's stretches, and the one after all devices'.
    """
    own = jnp.prod(w, axis=0), states_before(w, n, jnp.zeros_like(first))[1]
    first = jax.lax.psum(on_first_device(first, axis_name), axis_name)
    all_w, all_n = jax.lax.all_gather(own, axis_name)
    before, last = states_before(all_w, all_n, first)
    before = jax.lax.dynamic_index_in_dim(before, jax.lax.axis_index(axis_name), 0, False)
    return states_before(w, n, before)[0], last


def gradients_over_devices(
    w: Float[Array, "S B H #K"],
    n: Float[Array, "S B H V K"],
    last: Float[Array, "B H V K"],
    axis_name: str,
) -> tuple[Float[Array, "S B H V K"], Float[Array, "B H V K"]]:
    """`gradients_after` where the stretches go on over the devices of an axis.

    Args:
      w: decay of each of this device's stretches.
      n: gradient of the transposed state before each through its own outputs alone.
      last: gradient of the transposed state after all devices' stretches; every device returned
        that state, so the gradients add up.
      axis_name: the mesh axis.

    Returns:
      The gradient of the transposed state after each of this device's stretches, and that of the
      initial state, which is 0 but on the first device.
    """
    last = jax.lax.psum(last, axis_name)
    own = jnp.prod(w, axis=0), gradients_after(w, n, jnp.zeros_like(last))[1]
    all_w, all_n = jax.lax.all_gather(own, axis_name)
    after, first = gradients_after(all_w, all_n, last)
    after = jax.lax.dynamic_index_in_dim(after, jax.lax.axis_index(axis_name), 0, False)
    return gradients_after(w, n, after)[0], on_first_device(first, axis_name)
