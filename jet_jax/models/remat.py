"""What a layer keeps for its backward pass, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def _policies() -> list[str]:
    """The names in `jax.checkpoint_policies` that are policies, not makers of policies."""
    makers = ("save_", "offload")
    names = [n for n, f in vars(jax.checkpoint_policies).items() if callable(f)]
    return sorted(n for n in names if n[0].islower() and not n.startswith(makers))


def check(name: str) -> str:
    """Returns `name` if it is a remat policy.

    Raises:
      ValueError: otherwise, listing the names.
    """
    known = ["none", "full", *_policies()]
    if name not in known:
        raise ValueError(f"unknown remat policy {name!r}; known: {', '.join(known)}")
    return name


def remat(function: Callable[..., Any], name: str, *, in_scan: bool = False) -> Callable[..., Any]:
    """Wraps one layer's function.

    "none" keeps every activation, "full" none (the layer is computed again), any other name is a
    policy of `jax.checkpoint_policies`. Inside a scan (`in_scan`) the compiler needs no barrier
    against merging the two computations.
    """
    check(name)
    if name == "none":
        return function
    policy = None if name == "full" else getattr(jax.checkpoint_policies, name)
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)
