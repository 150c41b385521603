"""The blocks between Gated DeltaNet and the JetBlock, as arms of a comparison.

Each changes one thing of the released block (arXiv 2508.15884 §2.4), which prints no numbers for
them: that generated taps help on v and little on q and k, and that q and k lose little without a
convolution, is said there in words alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from jet_jax.delta_options import GDNOptions
from jet_jax.jet_options import JetOptions
from jet_jax.option_checks import require


class Ablation(NamedTuple):
    """What a block asks, its layer kind, and its changes to the released block's options."""

    about: str
    kind: str
    changes: Mapping[str, Any]


def _jet(about: str, **changes: Any) -> Ablation:
    return Ablation(about, "jet", changes)


ABLATIONS: dict[str, Ablation] = {
    "jet": _jet("the released block, generated taps on v alone"),
    "gdn": Ablation("where the design starts: learned taps on q, k and v", "gdn", {}),
    "no-conv": _jet("what is a convolution worth at all?", dynamic=()),
    "static-q": _jet("do learned taps help on q alone?", dynamic=(), static=("query",)),
    "static-k": _jet("on k alone?", dynamic=(), static=("key",)),
    "static-v": _jet("on v alone: generator or place?", dynamic=(), static=("value",)),
    "static-qk": _jet("are q and k better off with taps of their own?", static=("query", "key")),
    "dynamic-q": _jet("do generated taps help on q alone?", dynamic=("query",)),
    "dynamic-k": _jet("on k alone?", dynamic=("key",)),
    "dynamic-qkv": _jet("on all three?", dynamic=("query", "key", "value")),
    "frozen": _jet("must the generator learn, or do random taps do?", freeze_generator=True),
    "reduction-4": _jet("does a wider generator help?", generator_reduction=4),
    "reduction-8": _jet("the released width", generator_reduction=8),
    "reduction-16": _jet("is half of the released width enough?", generator_reduction=16),
    "taps-2": _jet("are two taps enough?", conv_size=2),
    "taps-3": _jet("are three?", conv_size=3),
    "taps-4": _jet("the released number", conv_size=4),
    "taps-6": _jet("do six help?", conv_size=6),
    "taps-8": _jet("do eight?", conv_size=8),
    "no-gate": _jet("what is the output gate worth?", use_gate=False),
}


def ablation_arms(base_options: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """The arms that lead to the JetBlock, for `ComparisonConfig.arms`.

    Args:
      base_options: options of `JetOptions` that the arms share, such as heads and widths; what is
        left out follows from the teacher's attention. Gated DeltaNet takes those that it knows.

    Returns:
      Name of `ABLATIONS` -> kind and options. Arms that are the base itself are left out: with the
      released 4 taps there is no "taps-4", that arm being "jet".

    Raises:
      ValueError: an unknown option.
    """
    base = dict(base_options or {})
    known = {field.name: field.default for field in dataclasses.fields(JetOptions)}
    unknown = sorted(base.keys() - known.keys())
    require(not unknown, f"base_options {unknown} are no options of the JetBlock: {list(known)}")
    of_gdn = {field.name for field in dataclasses.fields(GDNOptions)}
    arms = {}
    for name, (_, kind, changes) in ABLATIONS.items():
        if changes and changes.items() <= (known | base).items():
            continue
        shared = base if kind == "jet" else {k: v for k, v in base.items() if k in of_gdn}
        arms[name] = {"kind": kind, "options": {**shared, **changes}}
    return arms
