"""Metrics of a run: records on disk, throughput, model FLOP utilisation, memory."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

RECORDS = "metrics.jsonl"

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets, by a part of `device_kind`;
# the first match counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("GH200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("TPU v6", 918e12),
    ("TPU v5p", 459e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device: Any = None) -> float | None:
    """Dense bfloat16 FLOP/s of one device; None where it is not known, as on a CPU."""
    kind = (jax.devices()[0] if device is None else device).device_kind
    return next((flops for name, flops in PEAK_FLOPS if name in kind), None)


def memory_bytes() -> dict[str, int]:
    """Peak memory so far in bytes: `device_memory` of the first device, else `host_memory`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"device_memory": int(stats["peak_bytes_in_use"])}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"host_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


class Throughput:
    """Measures speed between two calls of `lap`, without the time spent in `pause`d parts.

    Args:
      flops_per_token: FLOPs of the training step a token: three times the forward pass;
        what remat computes again does not count.
      peak: FLOP/s of one device, None if not known.
    """

    def __init__(self, flops_per_token: float, peak: float | None):
        self._flops = flops_per_token
        self._peak = peak and peak * jax.device_count()
        self.start()

    def start(self) -> None:
        """Begins a new stretch."""
        self._start, self._paused = time.perf_counter(), 0.0

    def lap(self, steps: int, tokens: int) -> dict[str, float]:
        """Ends a stretch of `steps` steps with `tokens` row positions, padding included.

        Returns:
          `step_seconds`, `tokens_per_second`, and `mfu` (0 to 1) where the peak is known.
        """
        now = time.perf_counter()
        seconds = max(now - self._start - self._paused, 1e-9)
        self.start()
        out = {"step_seconds": seconds / steps, "tokens_per_second": tokens / seconds}
        if self._peak:
            out["mfu"] = tokens * self._flops / seconds / self._peak
        return out

    def pause(self, seconds: float) -> None:
        """Takes time off the stretch: an evaluation, a sample, a checkpoint."""
        self._paused += seconds


class Profiler:
    """Records a profiler trace of a few steps into `WORKDIR/profile`.

    Args:
      workdir: the run's directory.
      start: the first step to record.
      steps: how many; 0 records nothing.
    """

    def __init__(self, workdir: str | os.PathLike, start: int, steps: int):
        self._directory = str(Path(workdir) / "profile")
        self._first, self._last = (start, start + steps - 1) if steps else (None, None)
        self._running = False

    def before(self, step: int, ready: Any) -> None:
        """To be called before a step; waits for `ready` so that only whole steps are recorded."""
        if step == self._first:
            jax.block_until_ready(ready)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, ready: Any) -> None:
        """To be called after a step."""
        if step == self._last:
            jax.block_until_ready(ready)
            self.close()

    def close(self) -> None:
        """Ends a trace that is being recorded."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False


class MetricWriter:
    """Appends records to `metrics.jsonl` and, if wanted, TensorBoard files.

    A record is one JSON object a line: `step`, `kind` ("train", "valid", "sample"), and values.
    Only process 0 writes.

    Args:
      workdir: the run's directory.
      start: the step that the run starts from; older records of later steps (of a run that was
        killed after its last checkpoint) are dropped, so that no step is there twice.
    """

    def __init__(self, workdir: str | os.PathLike, start: int = 0):
        self.path = Path(workdir) / RECORDS
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        kept = [r for r in read_records(workdir) if r["step"] <= start] if start else []
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", buffering=1)
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        from tensorboardX import SummaryWriter

        self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Writes one record; numbers go to TensorBoard as scalars, strings as text."""
        if self._file is None or self._board is None:
            return
        record = {"step": step, "kind": kind, **values}
        self._file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            if isinstance(value, str):
                self._board.add_text(f"{kind}/{name}", value, step)
            elif isinstance(value, int | float):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def read_records(workdir: str | os.PathLike, kind: str | None = None) -> list[dict[str, Any]]:
    """Reads the records of a run, all or of one kind; a half-written last line is left out."""
    path = Path(workdir) / RECORDS
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # the process was killed while it wrote this line
            continue
        if kind is None or record["kind"] == kind:
            records.append(record)
    return records
