"""A conditional that is differentiated inside the branch taken.

JAX differentiates `lax.switch` in two: a forward pass that returns what every branch would need
backward (zeros for those not taken), and a backward one. Here the backward pass is one conditional
whose branch runs forward again and then back, so nothing but the operands is kept, and the compiler
sees both passes of a branch as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def switch(branches: Sequence[Callable[..., Any]], choice: Any, operands: PyTree) -> Any:
    """Applies `branches[choice]` to a tree of operands.

    Args:
      branches: functions of `operands` with results alike; they close over no traced array.
      choice: int32 scalar, may be traced.
      operands: arrays. Gradients are computed for those that the caller differentiates, and are 0
        for those that the branch taken does not read.

    Returns:
      The branch's result.
    """
    return jax.lax.switch(choice, branches, operands)


def _forward(branches, choice, operands):
    values = jax.custom_derivatives.custom_vjp_primal_tree_values(operands)
    moving = jax.tree.map(lambda x: x.value if x.perturbed else None, operands, is_leaf=_is_primal)
    return switch(branches, choice.value, values), (choice.value, values, moving)


def _backward(branches, residuals, cotangent):
    choice, values, moving = residuals

    def back(branch):
        def run(values, moving, cotangent):
            def forward(moving):
                return branch(jax.tree.map(_first, moving, values, is_leaf=_is_none))

            return jax.vjp(forward, moving)[1](cotangent)[0]

        return run

    return None, jax.lax.switch(choice, [back(b) for b in branches], values, moving, cotangent)


switch.defvjp(_forward, _backward, symbolic_zeros=True)


def _first(a, b):
    return b if a is None else a


def _is_none(x):
    return x is None


def _is_primal(x):
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)
