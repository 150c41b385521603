"""The arms of a comparison: one layer kind each, in the same places of the same teacher.

`block_arms` and `shape_arms` make arms for config files; `hybrid_config` is the model of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jet_jax.config import ModelConfig
from jet_jax.mixer_options import OPTIONS, build
from jet_jax.option_checks import require
from jet_jax.postnas.comparison_config import ArmConfig
from jet_jax.postnas.inherit import MATCHED, matched_options
from jet_jax.postnas.paths import FULL, LINEAR, WINDOW
from jet_jax.postnas.shapes import check_shapes, grid, shape_options

# The built-in linear blocks, in the order of arXiv 2508.15884, table 1, KDA after its kin.
BLOCKS = ("rwkv7", "retnet", "mamba2", "gla", "deltanet", "gdn", "kda", "jet")


def block_arms(kinds: Iterable[str] = BLOCKS) -> dict[str, dict[str, Any]]:
    """One arm a layer kind, each with the attention's heads and head_dim (so one state size).

    Args:
      kinds: layer types; convolutions, gates and norms are as each was published.

    Returns:
      `ComparisonConfig.arms`, each named after its kind.
    """
    return {kind: {"kind": kind, "options": {}} for kind in kinds}


def shape_arms(
    kind: str,
    product: int,
    heads: Sequence[int] = (),
    shapes: Iterable[str | Sequence[int]] = (),
    options: Mapping[str, Any] | None = None,
    **limits: Any,
) -> dict[str, dict[str, Any]]:
    """One arm a shape of constant cache, named as in "96-256-12" (key, value, heads).

    Args:
      kind: "gdn", "jet" or "kda".
      product: elements of a layer's state, key·value·heads.
      heads: numbers of heads for `shapes.grid`; not used where `shapes` are given.
      shapes: an explicit list.
      options: further options of every arm.
      limits: of `shapes.grid`.

    Returns:
      `ComparisonConfig.arms`.

    Raises:
      ValueError: a shape of another product, or a number of heads without a shape.
    """
    listed = list(shapes)
    found = check_shapes(product, listed) if listed else grid(product, heads, **limits)
    require(bool(found), "shape_arms needs heads=(...) for the grid, or shapes=(...)")
    return {
        str(shape): {"kind": kind, "options": dict(options or {}) | shape_options(shape)}
        for shape in found
    }


def arm_options(teacher: ModelConfig, name: str, arm: ArmConfig) -> Any:
    """The options of an arm's layers: those that match the attention, with the arm's changes.

    Args:
      teacher: the model that is converted.
      name: of the arm, for messages.
      arm: kind and changes. "swa", the teacher's own attention under a window, is a control and
        takes `window_size` alone. A kind registered without `matched` gets no options but the
        arm's.

    Raises:
      ValueError: options that are unknown or do not fit; it names the arm.
    """
    attention = teacher_attention(teacher)
    where, changes = f"arm {name!r}", dict(arm.options)
    if arm.kind == "swa":
        require(
            changes.keys() == {"window_size"},
            f"{where}: windowed layers are the teacher's own attention and take window_size alone; "
            f"given: {sorted(changes)}",
        )
        return dataclasses.replace(attention, **changes)
    given: dict[str, Any] = {}
    if arm.kind in MATCHED:
        matched = matched_options(arm.kind, attention, teacher.hidden_size)
        given = {f.name: getattr(matched, f.name) for f in dataclasses.fields(matched)}
    try:
        return build(OPTIONS[arm.kind], given | changes, where)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if where in text else f"{where}: {text}") from error


def teacher_attention(teacher: ModelConfig) -> Any:
    """The options of the teacher's attention, full if it has both."""
    mixers = dict(teacher.mixers)
    return mixers.get("attn") or mixers["swa"]


def hybrid_config(
    teacher: ModelConfig, path: Iterable[int], name: str, arm: ArmConfig, window: int | None = None
) -> ModelConfig:
    """The hybrid that has an arm's layers wherever the placement keeps no attention.

    Args:
      teacher: a model of softmax attention alone.
      path: int [L], of `paths.FULL`, `LINEAR` and `WINDOW`.
      name: of the arm, for messages.
      arm: what stands in the linear places.
      window: tokens that the windowed layers see; None takes the teacher's own.

    Raises:
      ValueError: a path of another length or without a linear layer, windowed layers of unknown
        or of two different windows, or options that do not fit; it names the arm.
    """
    choices = np.asarray(list(path), np.int32)
    layers = teacher.num_layers
    require(
        choices.shape == (layers,) and bool(np.isin(choices, (FULL, LINEAR, WINDOW)).all()),
        f"the placement is {choices.tolist()}, but the teacher has {layers} layers, each "
        f"{FULL} (full), {LINEAR} (linear) or {WINDOW} (windowed)",
    )
    require(
        bool((choices == LINEAR).any()),
        "the placement has no linear layer, so there is nothing to compare",
    )
    attention = teacher_attention(teacher)
    mixers: dict[str, Any] = {arm.kind: arm_options(teacher, name, arm)}
    if (choices == FULL).any():
        mixers["attn"] = dataclasses.replace(attention, window_size=None)
    if (choices == WINDOW).any():
        size = window or attention.window_size
        require(size is not None, "the placement has windowed layers: give the window's tokens")
        windowed = dataclasses.replace(attention, window_size=size)
        require(
            mixers.get("swa", windowed) == windowed,
            f"arm {name!r} is windowed itself, with another window than the placement's {size}",
        )
        mixers["swa"] = windowed
    kinds = tuple(("attn", arm.kind, "swa")[int(choice)] for choice in choices)
    try:
        return teacher.replace(layer_types=kinds, mixers=mixers, hf_json=None)
    except ValueError as error:
        raise ValueError(f"arm {name!r}: {error}") from error
