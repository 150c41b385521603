"""Learning rates as data: one compiled step serves runs of several peaks and lengths."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Float32, Int, PyTree

from jet_jax import optim
from jet_jax.optim import OptimConfig


class RatesState(NamedTuple):
    """Updates done, the rate of every update, and the rate of the last one."""

    count: Int[Array, ""]
    rates: Float[Array, " N"]
    used: Float[Array, ""]


def learning_rates(config: OptimConfig, steps: int, room: int) -> Float32[np.ndarray, " room"]:
    """The learning rate of every update of a run.

    Args:
      config: schedule and peak.
      steps: of the run.
      room: length of the array, at least `steps`; beyond the run it holds 0.

    Raises:
      ValueError: warm-up and decay do not fit in the run.
    """
    schedule = optim.make_schedule(config, steps)
    rates = np.zeros(room, np.float32)
    rates[:steps] = np.broadcast_to(np.asarray(schedule(np.arange(steps))), steps)
    return rates


def make_rate_optimizer(
    config: OptimConfig, trainable: PyTree, rates: Float32[np.ndarray, " N"]
) -> optax.GradientTransformation:
    """`optim.make_optimizer` whose learning rates lie in its state, not in the program.

    Optimizers that differ in `rates` alone update by the same program; `init` says which rates a
    run follows.

    Args:
      config: the optimizer's settings; its peak and schedule are not used.
      trainable: the parameters that train, or their `ShapeDtypeStruct`s.
      rates: from `learning_rates`.

    Returns:
      The optimizer; its state is a pair whose second part is a `RatesState`.
    """
    plain = dataclasses.replace(config, lr=1.0, schedule="constant", warmup_steps=0)
    base, _ = optim.make_optimizer(plain, len(rates), trainable)

    def init(params: PyTree) -> RatesState:
        del params
        return RatesState(jnp.zeros((), jnp.int32), jnp.asarray(rates), jnp.zeros(()))

    def update(updates, state, params=None):
        del params
        rate = state.rates[state.count]
        updates = optax.tree.scale(rate, updates)
        return updates, RatesState(state.count + 1, state.rates, rate)

    return optax.chain(base, optax.GradientTransformation(init, update))
