"""Ends a run cleanly when the machine or the user asks for it."""

from __future__ import annotations

import signal
from types import FrameType

import jax


class StopRequest:
    """Notes SIGTERM and SIGINT, so that the loop can save and leave after the step in hand.

    A second signal ends the process at once. With several processes all of them have to stop after
    the same step: JAX's coordination service then listens for SIGTERM itself and decides which.
    """

    def __init__(self) -> None:
        self.name = ""
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._note) for number in signals}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        self.close()

    def at(self, step: int) -> bool:
        """Whether the run should stop after this step."""
        if jax.process_count() == 1:
            return bool(self.name)
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def close(self) -> None:
        """Puts the signals' former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
