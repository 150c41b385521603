"""What every mixer is told beside its input: where it stands, and with what it is called."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Place:
    """Where in the model a mixer stands, which some initialisations and weights depend on.

    Attributes:
      index: the layer's number, counted from 0; may be traced.
      first: whether no layer before it is of the same type.
    """

    index: Any = 0
    first: bool = True


FIRST_LAYER = Place()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """One call's surroundings, the same for all layers.

    Attributes:
      segment_ids: [B, T] int32 or None. A segment is a maximal run of one non-zero id; 0 is
        padding. With a state there is one sequence a row and padding stands at the end.
      positions: [B, T] int32, counted from 0 in each sequence.
      lengths: [B] int32 or None, the real tokens that the state has seen before this call.
      shared: what earlier layers pass to later ones.
    """

    segment_ids: Any = None
    positions: Any = None
    lengths: Any = None
    shared: dict[str, Any] = dataclasses.field(default_factory=dict)
