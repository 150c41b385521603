"""AdamW for stacked layers of which a step trains some: the others neither move nor decay.

Every layer of every group has moments and a step count of its own, which a step that leaves the
layer out does not touch. Bias correction and moments are therefore those of the layer's own steps;
the learning rate follows the run's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from jet_jax import optim
from jet_jax.optim import OptimConfig


@dataclass(frozen=True)
class PathOptimizer:
    """The optimizer of groups of stacked weights, `{group: tree of [L, ...]}`.

    Attributes:
      inner: one layer's transformation, without clipping and learning rate.
      clip_norm: limit of the gradient's norm over all groups and layers; 0 is none.
      schedule: learning rate by the run's step.
      factors: learning-rate factor of each group.
    """

    inner: optax.GradientTransformation
    clip_norm: float
    schedule: Any
    factors: Mapping[str, float]

    def init(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The state before the first step: every leaf, the counts too, has an axis of layers."""
        return {name: jax.vmap(self.inner.init)(tree) for name, tree in params.items()}

    def update(
        self,
        grads: Mapping[str, Any],
        state: Mapping[str, Any],
        params: Mapping[str, Any],
        active: Mapping[str, Bool[Array, " L"]],
        step: Any,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One step.

        Args:
          grads: as `params`.
          state: from `init` or the last step.
          params: the weights.
          active: for each group the layers that this step trains.
          step: updates done before, for the schedule.

        Returns:
          `(params, state)`.
        """
        if self.clip_norm:
            norm = optax.tree.norm(grads)
            shrink = jnp.minimum(1.0, self.clip_norm / jnp.maximum(norm, 1e-9))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        rate = jnp.asarray(self.schedule(step), jnp.float32)
        new_params, new_state = {}, {}
        for name, tree in params.items():
            updates, after = jax.vmap(self.inner.update)(grads[name], state[name], tree)
            factor = rate * self.factors.get(name, 1.0)
            moved = jax.tree.map(lambda p, u, f=factor: p - f * u, tree, updates)
            keep = _chooser(active[name])
            new_params[name] = jax.tree.map(keep, moved, tree)
            new_state[name] = jax.tree.map(keep, after, state[name])
        return new_params, new_state


def make_path_optimizer(
    config: OptimConfig, steps: int, params: Mapping[str, Any], factors: Mapping[str, float]
) -> PathOptimizer:
    """Builds the optimizer.

    Args:
      config: AdamW and its schedule; `freeze` and `lr_multipliers` do not apply.
      steps: steps of the run.
      params: the groups (or their shapes), whose paths tell what decays.
      factors: learning-rate factor by group; those not named have 1.

    Raises:
      ValueError: for settings that have no meaning here, or a schedule that does not fit.
    """
    if config.freeze or config.lr_multipliers:
        raise ValueError("optim.freeze and optim.lr_multipliers do not apply to a supernet")
    mask = optim.decay_mask(params, config)
    inner = optax.chain(
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        # One mask for all groups: the paths below a group tell.
        optax.add_decayed_weights(config.weight_decay, lambda tree: _mask_of(tree, mask)),
    )
    return PathOptimizer(inner, config.clip_norm, optim.make_schedule(config, steps), factors)


def _mask_of(tree: Any, masks: Mapping[str, Any]) -> Any:
    structure = jax.tree.structure(tree)
    return next(m for m in masks.values() if jax.tree.structure(m) == structure)


def _chooser(active: Bool[Array, " L"]) -> Any:
    def keep(new: Array, old: Array) -> Array:
        return jnp.where(active.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return keep
