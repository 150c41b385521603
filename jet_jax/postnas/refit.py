"""An output projection fitted to the attention that it replaces, by ridge regression.

A copied o_proj expects the attention's averages of values; the linear mixer's norm and gate give
rows of another size. With X [N, F] the mixer's rows before the projection, Y [N, D] the attention's
outputs for the same inputs and W0 the copied kernel, the new one minimises

    |X W - Y|² + ridge · mean(diag XᵀX) · |W - W0|²

whose two sums XᵀX and XᵀY add up over batches. Where there is little data it stays at W0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jet_jax.mixers.context import Context
from jet_jax.option_checks import Number, require

HIGHEST = jax.lax.Precision.HIGHEST  # float32 that is not TF32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class NormalEquations:
    """The sums XᵀX [F, F] and XᵀY [F, D], float32. A pytree; all of it works under vmap.

    Outside of vmap, those of stacked layers have an axis before these.
    """

    gram: Float[Array, "*L F F"]
    moment: Float[Array, "*L F D"]

    @classmethod
    def zeros(cls, features: int, outputs: int) -> NormalEquations:
        """Nothing seen yet."""
        return cls(jnp.zeros((features, features)), jnp.zeros((features, outputs)))

    def add(
        self,
        features: Float[Array, "*B F"],
        target: Float[Array, "*B D"],
        mask: Bool[Array, "*B"] | None = None,
    ) -> NormalEquations:
        """The sums with a batch's rows added; where `mask` is False a row does not count."""
        x, y = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (features, target))
        if mask is not None:
            # Not a product with 0: rows of padding may be anything.
            x, y = (jnp.where(mask.reshape(-1, 1), a, 0) for a in (x, y))
        return NormalEquations(
            self.gram + jnp.dot(x.T, x, precision=HIGHEST),
            self.moment + jnp.dot(x.T, y, precision=HIGHEST),
        )

    def solve(self, start: Float[Array, "F D"], ridge: Number = 1e-3) -> Float[Array, "F D"]:
        """The kernel for these sums, `start` being W0; in start's dtype, `start` without rows.

        With ridge = 0 there must be F independent rows, else the result is not finite.

        Raises:
          ValueError: a negative ridge.
        """
        require(ridge >= 0, f"ridge={ridge} must not be negative")
        before = start.astype(jnp.float32)
        size = self.gram.shape[0]
        weight = jnp.maximum(ridge * jnp.trace(self.gram) / size, jnp.finfo(jnp.float32).tiny)
        factor = jax.scipy.linalg.cho_factor(self.gram + weight * jnp.eye(size))
        missing = self.moment - jnp.dot(self.gram, before, precision=HIGHEST)
        return (before + jax.scipy.linalg.cho_solve(factor, missing)).astype(start.dtype)


def refit_output(
    features: Float[Array, "*B F"],
    target: Float[Array, "*B D"],
    ridge: Number = 1e-3,
    *,
    start: Float[Array, "F D"],
    mask: Bool[Array, "*B"] | None = None,
) -> Float[Array, "F D"]:
    """The output projection's kernel fitted to one batch; see the top of this file.

    For several batches add them to `NormalEquations`; for stacked layers vmap either.

    Args:
      features: the mixer's rows before its output projection, from `output_inputs`.
      target: the attention's outputs, less the mixer's output bias where it has one.
      ridge: how much the kernel is held at its start, in units of the features' mean square.
      start: the kernel before, as copied.
      mask: False for rows that do not count, such as padding.

    Raises:
      ValueError: a negative ridge.
    """
    sums = NormalEquations.zeros(*start.shape).add(features, target, mask)
    return sums.solve(start, ridge)


def output_name(weights: Mapping[str, Any]) -> str:
    """The name of a mixer's output projection among its weights: "o_proj" or "out_proj".

    Raises:
      ValueError: it has neither.
    """
    for name in ("o_proj", "out_proj"):
        if name in weights:
            return name
    raise ValueError(f"no o_proj or out_proj among a mixer's weights {', '.join(weights)}")


class _Recorder:
    """Stands in for a layer and keeps its input."""

    def __init__(self, layer: nnx.Module):
        self.layer = layer
        self.inputs: Any = None

    def __call__(self, x: Array) -> Array:
        self.inputs = x
        return self.layer(x)  # type: ignore[operator]


def output_inputs(
    graphdef: Any, weights: Mapping[str, Any], x: Float[Array, "B T D"], ctx: Context
) -> tuple[Float[Array, "B T F"], dict[str, Any]]:
    """What a mixer feeds to its output projection, and the `shared` that it hands on.

    Args:
      graphdef: the mixer's static description.
      weights: its weights as a pure dict.
      x: the layer's (normalised) input.
      ctx: the call's context.

    Raises:
      ValueError: the mixer has no projection o_proj or out_proj.
    """
    mixer = nnx.merge(graphdef, weights)
    name = output_name(weights)
    recorder = _Recorder(getattr(mixer, name))
    setattr(mixer, name, recorder)
    _, _, shared = mixer(x, ctx)
    return recorder.inputs, shared
