"""Training steps that arms share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jet_jax.optim import OptimConfig
from jet_jax.postnas.path_optim import make_path_optimizer
from jet_jax.step import TrainState

STEPS_APART = 1_000_000  # of the counts of two seeds: a path follows from the count of its step


def tunable(make: Any, optim: OptimConfig, steps: int) -> Callable[..., Any]:
    """A training step whose peak learning rate and seed are arguments, so that arms share it.

    Args:
      make: `make(optimizer, state)` gives a step `(state, batch) -> (state, metrics)`.
      optim: the optimizer, its peak 1.
      steps: of the run.

    Returns:
      `step(state, batch, peak, seed) -> (state, metrics)`; it gives away the buffers of the state,
      but for the teacher's.
    """

    @partial(jax.jit, donate_argnums=0)
    def run(moving, frozen, batch, peak, seed):
        count, params, opt_state = moving
        first = seed * STEPS_APART
        unit = make_path_optimizer(optim, steps, params, {"full": 0.1})
        tuned = dataclasses.replace(unit, schedule=lambda n: peak * unit.schedule(n - first))
        state = TrainState(count + first, params, frozen, opt_state)
        new, values = make(tuned, state)(state, batch)
        return (new.step - first, new.params, new.opt_state), values

    def step(state, batch, peak, seed):
        moving = state.step, state.params, state.opt_state
        moving, values = run(moving, state.frozen, batch, peak, seed)
        return TrainState(moving[0], moving[1], state.frozen, moving[2]), values

    return step
