"""What the options of all mixers share: checks with messages, and the base class."""

from __future__ import annotations

from typing import Any

Number = float | int  # a typed float would not take an integer


def require(ok: bool, message: str) -> None:
    """Raises ValueError with the message unless `ok`."""
    if not ok:
        raise ValueError(message)


def require_positive(name: str, value: Any) -> None:
    """Raises ValueError naming the setting unless its value is an integer of at least 1."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{name}={value!r} must be an integer of at least 1",
    )


def require_one_of(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raises ValueError naming the setting and its choices unless the value is one of them."""
    listed = ", ".join(repr(choice) for choice in known)
    require(value in known, f"{name}={value!r} is unknown; use one of {listed}")


def whole(what: str, exact: Number, way_out: str) -> int:
    """The integer that a product of sizes and expansion factors is meant to be.

    Args:
      what: the product, for the message.
      exact: its value; factors such as 2.6666666667 make it slightly wrong.
      way_out: what to change, for the message.

    Raises:
      ValueError: it is not within 1e-5 of an integer of at least 1.
    """
    nearest = round(exact)
    require(
        nearest >= 1 and abs(exact - nearest) <= 1e-5 * nearest,
        f"{what} = {exact} is not an integer of at least 1; change {way_out}",
    )
    return nearest


class MixerOptions:
    """Base of every mixer's options, which are frozen dataclasses."""

    def check(self, hidden_size: int) -> None:
        """Raises ValueError if the options do not fit a model of that width."""
