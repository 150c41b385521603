"""Paths through the supernet: which mixer each layer takes, as an integer array.

A path is int32 [L]. `FULL` is the pretrained attention, `LINEAR` the linear-attention path and
`WINDOW` the pretrained attention under a sliding-window mask, with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

FULL, LINEAR, WINDOW = 0, 1, 2
LAWS = ("few_full", "bernoulli", "all_linear")


@dataclass(frozen=True)
class PathLaw:
    """How a training step draws its path.

    Attributes:
      name: `few_full` draws the number k of attention layers evenly from 0 to `max_full`, then k
        layers without replacement: what a search evaluates has few. `bernoulli` tosses a coin for
        every layer, which trains around L · `probability` attention layers; `all_linear` draws
        nothing.
      max_full: of `few_full`.
      probability: of `bernoulli`, that a layer keeps its attention.

    Source: arXiv 2508.15884 §2.2 samples a path a step and does not give the law.
    """

    name: str = "few_full"
    max_full: int = 8
    probability: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in LAWS:
            raise ValueError(f"path law {self.name!r} is unknown; use one of {', '.join(LAWS)}")
        if self.max_full < 0:
            raise ValueError(f"max_full={self.max_full} must not be negative")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability={self.probability} must lie between 0 and 1")


def sample_path(law: PathLaw, key: Array, teacher: Int32[Array, " L"]) -> Int32[Array, " L"]:
    """Draws a path; equal on every device and micro-batch, since it follows from the key alone.

    Args:
      law: how.
      key: typed key, such as `fold_in(key(seed), step)`.
      teacher: the teacher's own path, which layers that are not linear take.
    """
    number, order = jax.random.split(key)
    layers = teacher.shape[0]
    if law.name == "few_full":
        count = jax.random.randint(number, (), 0, min(law.max_full, layers) + 1)
        kept = jax.random.permutation(order, layers) < count
    elif law.name == "bernoulli":
        kept = jax.random.bernoulli(order, law.probability, (layers,))
    else:
        kept = jnp.zeros(layers, bool)
    return jnp.where(kept, teacher, LINEAR).astype(jnp.int32)


def path_of(
    teacher: Int32[np.ndarray, " L"], full: Iterable[int], window: Iterable[int] = ()
) -> Int32[np.ndarray, " L"]:
    """The path that keeps some layers' attention, all others linear.

    Args:
      teacher: the teacher's own path, which `full` layers take.
      full: layers, counted from 0.
      window: layers with a sliding window.

    Raises:
      ValueError: a layer does not exist, or is named twice.
    """
    path = np.full(len(teacher), LINEAR, np.int32)
    seen: set[int] = set()
    for layers, kind in ((full, None), (window, WINDOW)):
        for layer in layers:
            if not 0 <= layer < len(teacher):
                raise ValueError(f"layer {layer} does not exist: there are 0 to {len(teacher) - 1}")
            if layer in seen:
                raise ValueError(f"layer {layer} is named twice")
            seen.add(layer)
            path[layer] = teacher[layer] if kind is None else kind
    return path
