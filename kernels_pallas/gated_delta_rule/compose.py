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
