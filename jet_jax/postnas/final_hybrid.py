"""The hybrid of a placement with another layer than the supernet's: the teacher, aligned anew.

Nothing of the supernet fits such a layer, so its training begins where that of a comparison's arm
does: with the alignment to the teacher's attention. Without it a run of distillation starts at many
times the loss.

    WORKDIR/BLOCKS or SHAPES/ARM/align-SEED, WORKDIR/final/align-SEED      what is aligned
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jet_jax.config import ModelConfig
from jet_jax.option_checks import require
from jet_jax.postnas.arm_runs import ArmRuns
from jet_jax.postnas.comparison import check
from jet_jax.postnas.comparison_config import ComparisonConfig
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import COMPARED, final_comparison


def converted(search: Search) -> tuple[ModelConfig, dict[str, Any], int]:
    """The hybrid that `config.final` names, its new layers aligned to the attention they replace.

    The layer that a comparison chose is aligned as it was there, with the first seed; that is not
    done again where its weights were kept. A layer that `final` names itself is aligned by the
    settings `align`.

    Args:
      search: whose `final` is "blocks", "shapes" or a layer type.

    Returns:
      The model's config; its weights, nested: the teacher's in its compute dtype, those of the new
      layers float32; and the tokens that these were aligned on, 0 where the settings have no
      alignment.

    Raises:
      ValueError: the placement or the comparison is not done, options that do not fit, or a folder
        of another comparison.
      Stopped: after SIGTERM or Ctrl-C, when the step in hand is saved.
    """
    name, settings = chosen(search)
    final = search.config.final
    folder = search.workdir / (final if final in COMPARED else "final")
    folder.mkdir(exist_ok=True)
    arms = {arm.name: arm for arm in check(settings, folder, search.comparison(settings))}
    runs: ArmRuns = arms[name]
    tokens = settings.align_steps * search.config.data.batch_size * search.config.data.seq_len
    return runs.config, runs.aligned(settings.seeds[0]), tokens


def chosen(search: Search) -> tuple[str, ComparisonConfig]:
    """The arm that `config.final` stands for, and the comparison that it is of.

    Raises:
      ValueError: the comparison is not done, or none of its arms could be trained.
    """
    c = search.config
    if c.final == "shapes":
        return search.result("shapes")["arm"], c.shapes
    if c.final == "blocks":
        return best_arm(search.result("blocks"), search.judge(c.blocks)), c.blocks
    return "final", final_comparison(c)


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
