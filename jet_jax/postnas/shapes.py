"""Shapes of linear mixers that keep equally much: key width, value width and heads of a state.

A recurrent state has key·value·heads elements a layer, so shapes of one product have one cache
size, and at long context one decoding speed, while parameters and quality differ (Jet-Nemotron,
arXiv 2508.15884, §2.5).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from jet_jax.config import ModelConfig
from jet_jax.option_checks import require, require_positive


class Shape(NamedTuple):
    """Widths of one head's key and value, and the number of heads. Prints as "96-256-12"."""

    key: int
    value: int
    heads: int

    @property
    def product(self) -> int:
        """Elements of a layer's state."""
        return self.key * self.value * self.heads

    def __str__(self) -> str:
        return f"{self.key}-{self.value}-{self.heads}"

    @classmethod
    def of(cls, given: str | Sequence[int]) -> Shape:
        """A shape from "96-256-12" (or with "/" or "x") or from three numbers.

        Raises:
          ValueError: it is neither, or a number is below 1.
        """
        parts: list[Any] = list(given)
        if isinstance(given, str):
            texts = given.replace("/", "-").replace("x", "-").split("-")
            parts = [int(text) if text.isdecimal() else 0 for text in texts]
        if len(parts) != 3 or not all(isinstance(n, int) and n >= 1 for n in parts):
            raise ValueError(f"{given!r} is no shape; write KEY-VALUE-HEADS, such as 96-256-12")
        return cls(*parts)


def check_shapes(product: int, shapes: Iterable[str | Sequence[int]]) -> list[Shape]:
    """An explicit list of shapes, for `grid`'s.

    Raises:
      ValueError: a shape keeps more or less than `product` elements; it names both.
    """
    out = [Shape.of(shape) for shape in shapes]
    for shape in out:
        require(
            shape.product == product,
            f"shape {shape} has a state of {shape.key}·{shape.value}·{shape.heads} = "
            f"{shape.product:,} elements, not {product:,}; the search compares equal caches",
        )
    return out


def grid(
    product: int,
    heads: Sequence[int],
    per_heads: int = 3,
    multiple: int = 16,
    *,
    max_key: int = 256,
    max_key_width: int = 2048,
) -> list[Shape]:
    """Shapes of one product: for each number of heads those with the widest keys.

    Keys are 2^n or 3·2^n wide, which kernels tile well. With its defaults and 294,912 elements in
    4, 8 and 12 heads it gives the nine shapes of arXiv 2508.15884, table 2, in their order; the
    paper names no rule, this one was fitted to them.

    Args:
      product: key·value·heads.
      heads: numbers of heads.
      per_heads: the most shapes for each of them.
      multiple: keys and values are multiples of it.
      max_key: the widest key.
      max_key_width: the most channels that all heads' keys may have together.

    Raises:
      ValueError: no shape has a number of heads; it names both.
    """
    for name, number in (("product", product), ("per_heads", per_heads), ("multiple", multiple)):
        require_positive(name, number)
    ladder = sorted((m << n for m in (1, 3) for n in range(max_key.bit_length())), reverse=True)
    out = []
    for count in heads:
        require_positive("heads", count)
        found = [
            Shape(key, product // (key * count), count)
            for key in ladder
            if key <= min(max_key, max_key_width // count)
            and key % multiple == 0
            and product % (key * count * multiple) == 0
        ]
        require(
            bool(found),
            f"no shape with heads={count} has product={product:,} and widths that are multiples of "
            f"{multiple}; change one of them, or list the shapes",
        )
        out += found[:per_heads]
    return out


def shape_options(shape: Shape) -> dict[str, Any]:
    """The shape as options of a mixer: `num_heads`, `head_dim` and `expand_v`.

    The published code truncates head_dim·expand_v, so `expand_v` is the least float from
    value/key on whose products are not below the value widths.
    """
    expand = shape.value / shape.key
    while (
        int(shape.key * expand) < shape.value
        or int(shape.heads * shape.key * expand) < shape.heads * shape.value
    ):
        expand = math.nextafter(expand, math.inf)
    return {"num_heads": shape.heads, "head_dim": shape.key, "expand_v": expand}


def shape_of(config: ModelConfig, kind: str) -> Shape:
    """The shape that the layers of a kind have. Raises ValueError for a kind without one."""
    options = config.options(kind)
    require(
        hasattr(options, "state_shape"), f"{kind!r} layers keep no recurrent state to give a shape"
    )
    heads, key, value = options.state_shape(config.hidden_size)
    return Shape(key, value, heads)


def shaped(config: ModelConfig, kind: str, shape: str | Sequence[int]) -> ModelConfig:
    """The hybrid with the layers of one kind reshaped, everything else as it was.

    Args:
      config: a hybrid that has layers of that kind.
      kind: "gdn", "jet" or "kda"; value heads become as many as key heads.
      shape: key, value, heads.

    Raises:
      ValueError: no layer is of that kind, its options take no such shape, or what else the
        options refuse (a JetBlock's value width must be a multiple of its generator_reduction).
    """
    options, shape = config.options(kind), Shape.of(shape)
    require(kind in config.layer_types, f"no layer is {kind!r}: {set(config.layer_types)}")
    known = {field.name for field in dataclasses.fields(options)}
    changes = shape_options(shape)
    require(
        changes.keys() <= known,
        f"{kind!r} layers have no num_heads, head_dim and expand_v; reshape gdn, jet or kda layers",
    )
    if "num_v_heads" in known:
        changes["num_v_heads"] = None
    options = dataclasses.replace(options, **changes)
    return config.replace(mixers=dict(config.mixers) | {kind: options})
