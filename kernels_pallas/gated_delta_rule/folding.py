"""What makes a foreign kernel call an ordinary operation of JAX: a rule for `vmap`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_mapped_axis(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets `vmap` call a function of arrays [B, ...] once, its own axis folded into B.

    jax-triton has no rule for `vmap`. It also keeps its calls from being dropped as dead code
    before XLA sees them, and with them, under `jax.checkpoint`, what they read; inside this they
    are dropped like any other.
    """
    folding = jax.custom_batching.custom_vmap(function)

    @folding.def_vmap
    def rule(size, is_mapped, *args):
        def fold(x, mapped):
            x = x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        out = folding(*jax.tree.map(fold, args, tuple(is_mapped)))
        out = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return folding
