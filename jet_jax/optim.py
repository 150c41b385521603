"""AdamW with schedules, learning-rate groups and freezing by parameter path.

Paths are dotted (`layers.3.mixer.q_proj.kernel`), patterns are regular expressions found anywhere
in them: `mixer` is every mixer, `^layers\\.3\\.` one layer. A pattern that finds
nothing is an error: it is a typo far more often than a wish.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from jet_jax.sharding import dotted

SCHEDULES = ("cosine", "wsd", "constant")
# Decay pulls a weight towards zero; for these, zero is no neutral value, or they do not train.
NO_DECAY = r"(^|\.)((bias|scale|A_log|dt_bias|D|b2|x_[rwkvag]|k_k|k_a|r_k)$|frozen_)"
EMBEDDING = r"(^|\.)embed_tokens\.embedding$"

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
      lr: peak learning rate.
      schedule: `cosine` (to `min_lr_ratio` at the last step), `wsd` (warm up, stay, decay
        linearly over the last `decay_steps`; arXiv:2404.06395) or `constant`.
      warmup_steps: steps of linear warm-up from 0.
      decay_steps: length of the `wsd` decay; 0 means a tenth of the run.
      min_lr_ratio: last learning rate as a fraction of `lr`.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, times the learning rate; not for norms, biases, `A_log`,
        `dt_bias`, Mamba2's `D`, RWKV-7's vectors and the generator's static taps.
      decay_embedding: whether the embedding decays too.
      clip_norm: limit of the global gradient norm; 0 is no limit.
      lr_multipliers: `(pattern, factor)` pairs, the first match counts; the others have factor 1.
      freeze: patterns of parameters that do not train; they get no gradient and no moments.
    """

    lr: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    min_lr_ratio: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embedding: bool = False
    clip_norm: float = 1.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()
    freeze: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optim.schedule={self.schedule!r} is unknown; use one of {', '.join(SCHEDULES)}."
            )
        for name in ("lr", "warmup_steps", "decay_steps", "min_lr_ratio", "weight_decay",
                     "clip_norm"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative.")
        pairs = tuple((str(pattern), float(x)) for pattern, x in self.lr_multipliers)
        object.__setattr__(self, "lr_multipliers", pairs)
        object.__setattr__(self, "freeze", tuple(self.freeze))


def make_schedule(config: OptimConfig, steps: int) -> Schedule:
    """Builds the learning rate as a function of the step.

    Args:
      config: the optimizer's settings.
      steps: steps of the whole run.

    Returns:
      A function of the number of updates done (0 before the first) that gives the next update's
      learning rate. The first warm-up step already moves: step 0 has `lr / warmup_steps`.

    Raises:
      ValueError: if warm-up and decay take more steps than the run has.
    """
    decay = config.decay_steps or max(1, steps // 10)
    needed = config.warmup_steps + (decay if config.schedule == "wsd" else 0)
    if needed > steps:
        raise ValueError(
            f"optim.warmup_steps={config.warmup_steps}"
            + (f" and decay_steps={decay}" if config.schedule == "wsd" else "")
            + f" do not fit in steps={steps}."
        )
    last = config.lr * config.min_lr_ratio
    rest = max(1, steps - config.warmup_steps)
    if config.schedule == "cosine":
        main = optax.cosine_decay_schedule(config.lr, rest, config.min_lr_ratio)
    elif config.schedule == "wsd":
        main = optax.linear_schedule(config.lr, last, decay, transition_begin=rest - decay)
    else:
        main = optax.constant_schedule(config.lr)
    if not config.warmup_steps:
        return main
    first = config.lr / config.warmup_steps
    warmup = optax.linear_schedule(first, config.lr, max(1, config.warmup_steps - 1))
    return optax.join_schedules([warmup, main], [config.warmup_steps])


def partition(params: Mapping, freeze: Sequence[str]) -> tuple[dict, dict]:
    """Splits parameters into those that train and those that are frozen.

    Args:
      params: nested dict of parameters.
      freeze: patterns of frozen paths.

    Returns:
      `(trainable, frozen)`, both nested dicts without empty branches; `combine` joins them again.

    Raises:
      ValueError: if a pattern finds nothing, or nothing is left to train.
    """
    paths = _paths(params)
    _require_matches("optim.freeze", freeze, paths)
    chosen = {path for path in paths if any(re.search(p, path) for p in freeze)}
    if len(chosen) == len(paths):
        raise ValueError(f"optim.freeze={tuple(freeze)} freezes every parameter; nothing trains.")
    return _prune(params, lambda path: path not in chosen), _prune(params, chosen.__contains__)


def combine(a: Mapping, b: Mapping) -> dict:
    """Joins two nested dicts with disjoint leaves; the inverse of `partition`."""
    out = dict(a)
    for key, value in b.items():
        out[key] = combine(out[key], value) if key in out else value
    return out


def lr_multipliers(params: PyTree, config: OptimConfig) -> PyTree:
    """Gives every parameter its learning-rate factor.

    Raises:
      ValueError: if a pattern of `config.lr_multipliers` finds no parameter.
    """
    patterns = [pattern for pattern, _ in config.lr_multipliers]
    _require_matches("optim.lr_multipliers", patterns, _paths(params))

    def factor(path, _):
        name = dotted(path)
        return next((x for p, x in config.lr_multipliers if re.search(p, name)), 1.0)

    return jax.tree_util.tree_map_with_path(factor, params)


def decay_mask(params: PyTree, config: OptimConfig) -> PyTree:
    """Says for every parameter whether weight decay applies to it."""
    skip = NO_DECAY if config.decay_embedding else f"{NO_DECAY}|{EMBEDDING}"
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not re.search(skip, dotted(path)), params
    )


def make_optimizer(
    config: OptimConfig, steps: int, trainable: PyTree
) -> tuple[optax.GradientTransformation, Schedule]:
    """Builds the optimizer for the parameters that train.

    Args:
      config: the optimizer's settings.
      steps: steps of the whole run.
      trainable: the parameters that train (or their `ShapeDtypeStruct`s), as from `partition`.

    Returns:
      `(optimizer, schedule)`; the optimizer clips, then applies AdamW with per-parameter factors.
    """
    schedule = make_schedule(config, steps)
    factors = lr_multipliers(trainable, config)
    parts = [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(config.weight_decay, decay_mask(trainable, config)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors)),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*parts), schedule


def _paths(params: PyTree) -> list[str]:
    return [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _require_matches(what: str, patterns: Sequence[str], paths: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}.") from error
        if not found:
            shown = ", ".join(paths[:: max(1, len(paths) // 4)][:4])
            raise ValueError(f"{what}: {pattern!r} matches no parameter; paths look like {shown}.")


def _prune(tree: Mapping, keep: Callable[[str], bool], prefix: str = "") -> dict:
    out = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if branch := _prune(value, keep, f"{path}."):
                out[key] = branch
        elif keep(path):
            out[key] = value
    return out
