"""A few layers that stand in for a teacher and its placement, to see early what does not fit."""

from __future__ import annotations

from jet_jax.config import ModelConfig
from jet_jax.distill import Teacher
from jet_jax.postnas.paths import FULL, LINEAR, WINDOW
from jet_jax.step import abstract_model


def stand_in(teacher: ModelConfig, full: int, windows: int) -> tuple[Teacher, list[int]]:
    """A teacher of a few layers and a placement in it.

    Arms fit a teacher's widths and kinds of layers or do not, whatever their number, and for a few
    layers that is known in a second.

    Args:
      teacher: the model that is converted.
      full: layers that will keep their attention.
      windows: layers that will have a window.

    Returns:
      The teacher, its weights `ShapeDtypeStruct`s; and a path with a layer of each kind that the
      placement will have, and two linear ones, as some mixers' first layer differs.
    """
    kinds = tuple(dict.fromkeys(teacher.layer_types))
    kept = [WINDOW if kind == "swa" else FULL for kind in kinds] if full else [LINEAR] * len(kinds)
    path = [*kept, *[WINDOW] * min(windows, 1), LINEAR, LINEAR]
    layers = (*kinds, *kinds[:1] * (len(path) - len(kinds)))
    small = teacher.replace(layer_types=layers, hf_json=None)
    return Teacher(small, *abstract_model(small)), path
