"""Choosing the implementation of an operation."""

from collections.abc import Callable, Mapping
from typing import Any

from kernels_pallas.backend import platform, suits_kernels


def dispatch(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    implementation: str | None,
    *args: Any,
    kernels_on: tuple[str, ...] = ("gpu", "tpu"),
    **kwargs: Any,
) -> Any:
    """Calls one implementation of an operation.

    Args:
      op: name of the operation, for messages.
      implementations: name to function, fastest first. A function that cannot take the arguments
        raises `NotImplementedError` with the reason.
      implementation: the one to call, without any fallback; None takes the first that supports
        the arguments.
      *args: passed on.
      kernels_on: platforms where None may take "pallas", on devices that its blocks are cut for;
        never a CPU, where it is interpreted.
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
    for name, function in implementations.items():
        if name == "pallas" and not (platform() in kernels_on and suits_kernels()):
            continue
        try:
            return function(*args, **kwargs)
        except NotImplementedError as error:
            reasons.append(f"{name}: {error}")
    raise NotImplementedError(
        f"{op}: no implementation takes these arguments; " + "; ".join(reasons)
    )
