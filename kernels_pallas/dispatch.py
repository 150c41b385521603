"""Choosing the implementation of an operation."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from kernels_pallas.backend import platform, suits_kernels

# Name of `preferring`. JAX keeps traces by it: what was traced with one is not used with another.
_preferred = jax.make_user_context(None)


@contextlib.contextmanager
def preferring(implementation: str) -> Iterator[None]:
    """Lets operations that are called without an `implementation` take a certain one first.

    Those that have none of that name, or whose arguments it does not support, choose as ever. For
    benchmarks and tests of layers, which leave the choice to the operations; enter it inside the
    function that is traced.

    Args:
      implementation: "reference", "xla" or "pallas", the last also where it would be taken by name
        only, and interpreted on a CPU.
    """
    with _preferred(implementation):
        yield


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls one implementation of an operation.

    Args:
      op: name of the operation, for messages.
      implementations: name to function, fastest first. A function that cannot take the arguments
        raises `NotImplementedError` with the reason.
      implementation: the one to call, without any fallback; None takes the first that supports
        the arguments (see `preferring`), "pallas" only on devices that its blocks are cut for.
      *args: passed on.
      **kwargs: passed on.

    Returns:
      What the implementation returns.

    Raises:
      ValueError: `implementation` is not a known name, or cannot take the arguments.
      NotImplementedError: no implementation takes the arguments.
    """
    if implementation is not None:
        if implementation not in implementations:
            known = ", ".join(repr(name) for name in implementations)
            raise ValueError(
                f"{op}: implementation={implementation!r} is unknown; use one of {known}, "
                "or None for the fastest that supports the arguments"
            )
        try:
            return implementations[implementation](*args, **kwargs)
        except NotImplementedError as error:
            raise ValueError(
                f"{op}: implementation={implementation!r} cannot take these arguments: {error}"
            ) from error
    reasons = []
    first = _preferred.value
    for name in sorted(implementations, key=lambda name: name != first):
        function = implementations[name]
        unnamed = name == "pallas" and name != first
        if unnamed and not (platform() != "cpu" and suits_kernels()):
            continue
        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(
        f"{op}: no implementation takes these arguments; " + "; ".join(reasons)
    )
