"""Timing on an asynchronous device, and the two rates that floors come from."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

CALLS = 20  # at most; a batch of calls takes about BATCH_SECONDS
BATCH_SECONDS = 0.1
HOW = (
    "Each time is the median over batches of calls that are dispatched one after another and "
    "waited for once, divided by the calls of a batch, after two calls that are not counted. "
    "Inputs stay on the device. A decoding step is timed as one of 20 in a program, the state "
    "donated, as in decoding."
)


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Times one call of many in a row.

    Args:
      call: dispatches work and returns its results without waiting for them.
      repeats: batches; the median of their times counts.

    Returns:
      Seconds a call. The device works on one while the host dispatches the next, so the host's own
      time shows only where it is the longer.
    """
    for _ in range(2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        once = time.perf_counter() - start
    calls = max(1, min(CALLS, round(BATCH_SECONDS / max(once, 1e-6))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What the device can do.

    Attributes:
      copy_gb_s: bytes read plus bytes written a second by a copy, in GB/s.
      matmul_tflop_s: of a square bfloat16 matrix product, in TFLOP/s.
    """

    copy_gb_s: float
    matmul_tflop_s: float

    def floor_seconds(self, num_bytes: int, flops: int) -> float:
        """The least time for moving the bytes and computing the products, one beside the other."""
        return max(num_bytes / (self.copy_gb_s * 1e9), flops / (self.matmul_tflop_s * 1e12))


def measure_ceilings(small: bool, repeats: int) -> Ceilings:
    """Measures a copy, to new memory or in place, whichever is faster, and a matrix product.

    Args:
      small: sizes for a CPU.
      repeats: as for `median_seconds`.

    Returns:
      The rates.
    """
    n, length = (512, 2**24) if small else (8192, 2**28)
    held = jnp.ones((length,), jnp.float32)
    copy = jax.jit(jnp.copy)
    add = jax.jit(lambda x: x + 1, donate_argnums=0)

    def in_place():
        nonlocal held
        held = add(held)
        return held

    seconds = min(median_seconds(call, repeats) for call in (lambda: copy(held), in_place))
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    rate = 2 * n**3 / median_seconds(lambda: product(a, b), repeats)
    return Ceilings(2 * held.nbytes / seconds / 1e9, rate / 1e12)
