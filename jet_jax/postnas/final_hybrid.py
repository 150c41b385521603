"""The hybrid of a placement with another layer than the supernet's, made from the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import jax

from jet_jax import io, sharding
from jet_jax.config import ModelConfig
from jet_jax.distill import Teacher
from jet_jax.option_checks import require
from jet_jax.params import split
from jet_jax.postnas.arms import hybrid_config
from jet_jax.postnas.comparison_config import ArmConfig
from jet_jax.postnas.hybrid_start import new_mixers
from jet_jax.postnas.paths import LINEAR
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import COMPARED


def converted(search: Search, path: Sequence[int]) -> tuple[ModelConfig, dict[str, Any]]:
    """The hybrid that `config.final` names, its new layers not trained yet.

    Args:
      search: whose `final` is "blocks", "shapes" or a layer type.
      path: int [L], the placement.

    Returns:
      The model's config and its weights, nested: the teacher's in its compute dtype, those of the
      new layers float32, started as the comparison's, or as `linear.init` says.

    Raises:
      ValueError: the comparison is not done, or options do not fit.
    """
    c = search.config
    arm = chosen_arm(search)
    config = hybrid_config(search.teacher, path, "final", arm, search.window)
    model = io.load(c.teacher, dtype=search.teacher.dtype, mesh=search.mesh)
    init = getattr(c, c.final).init if c.final in COMPARED else c.linear.init
    layers = [i for i, choice in enumerate(path) if choice == LINEAR]
    with closing(search.batches(2)) as iterator, jax.set_mesh(search.mesh):
        batches = (
            sharding.put_batch(b, search.mesh) for b in islice(iterator, c.linear.refit_batches)
        )
        key = jax.random.key(c.seed)
        mixers = new_mixers(config, Teacher.of(model), layers, init, key, batches)
    weights = split(model)[1]
    for i in layers:
        weights["layers"][i] = {**weights["layers"][i], "mixer": mixers[i]}
    return config, weights


def chosen_arm(search: Search) -> ArmConfig:
    """The layer that `config.final` stands for."""
    c = search.config
    if c.final == "shapes":
        kind = next(iter(c.shapes.arms.values())).kind
        return ArmConfig(kind, search.result("shapes")["options"])
    if c.final == "blocks":
        return c.blocks.arms[best_arm(search.result("blocks"), search.judge(c.blocks))]
    return ArmConfig(c.final, c.final_options)


def best_arm(comparison: Mapping[str, Any], objective: str) -> str:
    """The arm with the best mean of an objective.

    Raises:
      ValueError: no arm has one.
    """
    means = {
        arm: found["figures"][objective]["mean"]
        for arm, found in comparison["arms"].items()
        if found["figures"][objective]["mean"] is not None
    }
    require(bool(means), "no arm of the comparison of blocks could be trained")
    more = comparison["objectives"][objective]["more_is_better"]
    return (max if more else min)(means, key=lambda arm: means[arm])
