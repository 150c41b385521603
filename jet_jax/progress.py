"""What a run shows in the terminal: the parameter table, and a live line with the time left."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.table import Table

from jet_jax import optim, sharding
from jet_jax.params import flatten

SAY_EVERY = 10.0  # seconds between the lines that tell of a count where there is no live line


class Display:
    """Prints on process 0 only; a live line on a terminal, plain lines elsewhere.

    Args:
      steps: steps of the whole run.
      start: the step that the run starts from.
      live: whether there may be a live line.
    """

    def __init__(self, steps: int, start: int = 0, *, live: bool = True):
        # Where there is no terminal to ask for its width, tables get enough of it.
        width = None if Console().is_terminal else 120
        quiet = jax.process_index() != 0
        self.console = Console(soft_wrap=True, highlight=False, quiet=quiet, width=width)
        self._steps = steps
        self._began = self._said = time.monotonic()  # a count, and its last line
        self._progress = None
        if live and self.console.is_terminal and not self.console.quiet:
            columns = (
                BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("left"), Remaining(),
            )  # fmt: skip
            self._progress = Progress(*columns, console=self.console)
            self._task = self._progress.add_task("", total=steps, completed=start, text="compiling")
            self._progress.start()

    def step(self, step: int) -> None:
        """Moves the live line."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def train(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows training metrics: in the live line, or as a line of their own."""
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  |g| {values['grad_norm']:.2f}  "
            f"{values['tokens_per_second']:,.0f} tok/s"
        )
        text += f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        else:
            left = (self._steps - step) * values["step_seconds"]
            self.say(f"step {step}/{self._steps}  {text}  {_clock(left)} left")

    def count(self, what: str, done: int, total: int) -> None:
        """Shows how far something is that is counted from 0: in the live line, or now and then.

        Args:
          what: is counted, for the screen.
          done: how many are done; 0 begins a new count.
          total: how many there will be.
        """
        now = time.monotonic()
        if done == 0:
            self._began = now
        if self._progress is not None and done == 0:
            self._progress.reset(self._task, total=total, text=what)
        elif self._progress is not None:
            self._progress.update(self._task, completed=done)
        elif done and now - self._said >= SAY_EVERY:
            self._said = now
            left = (now - self._began) / done * (total - done)
            self.say(f"{what} {done}/{total}  {_clock(left)} left")

    def say(self, text: str) -> None:
        """Prints text as it is, above the live line."""
        self.console.print(text, markup=False)

    def close(self) -> None:
        """Ends the live line."""
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def closing_words(workdir: Path, finished: bool, curve: Path | None, prompt: str) -> str:
    """Says where a run's results are and what to type next."""
    if "UV" in os.environ:
        cli = "uv run --frozen jet-jax"
    else:
        cli = "jet-jax" if shutil.which("jet-jax") else f"{sys.executable} -m jet_jax"
    lines = [
        "",
        "Finished." if finished else "Stopped; the same command continues.",
        f"  model       {workdir}",
        f"  loss curve  {curve}",
        "Next:",
        f'  {cli} generate {workdir} --prompt "{prompt}" --temperature 0.8',
        f"  {cli} info {workdir}",
        f"  {cli} convert {workdir} {workdir}-hf --to hf",
    ]
    return "\n".join(lines)


def parameter_table(params: PyTree, mesh: Mesh, config: optim.OptimConfig) -> Table:
    """Lists a model's parameters; equal layers share a row.

    Args:
      params: nested dict of parameters or `ShapeDtypeStruct`s.
      mesh: the mesh.
      config: the optimizer's settings, for learning-rate factors and freezing.

    Returns:
      A table of path, shape, dtype, count, placement on the mesh (an axis that the rule asks for
      but that does not divide is named there), learning-rate factor and whether it trains.
    """
    factors = flatten(optim.lr_multipliers(params, config))
    rows: dict[tuple, list[str]] = {}
    sizes: dict[tuple, int] = {}
    for path, x in flatten(params).items():
        place = sharding.placement(path, x.shape, mesh)
        where = ", ".join("-" if axis is None else str(axis) for axis in place.spec)
        where = where if any(place.spec) else "whole"
        where += "".join(f" ({a} does not divide {n})" for a, n in place.dropped)
        frozen = any(re.search(pattern, path) for pattern in config.freeze)
        train = "frozen" if frozen else f"lr x {factors[path]:g}"
        shape = " x ".join(str(n) for n in x.shape)
        key = (re.sub(r"^layers\.\d+\.", "", path), shape, str(x.dtype), where, train)
        number = re.match(r"layers\.(\d+)\.", path)
        rows.setdefault(key, []).append(number[1] if number else "")
        sizes[key] = sizes.get(key, 0) + x.size
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("layers", "parameter", "shape", "dtype", "count", "mesh", "training"):
        table.add_column(name, justify="right" if name == "count" else "left")
    for (path, shape, dtype, where, train), layers in rows.items():
        table.add_row(
            _ranges(layers), path, shape, dtype, f"{sizes[path, shape, dtype, where, train]:,}",
            where, train,
        )  # fmt: skip
    table.add_section()
    table.add_row("", "total", "", "", f"{sum(sizes.values()):,}", "", "")
    return table


def _ranges(layers: list[str]) -> str:
    """`["0", "1", "2", "5"]` -> `"0-2,5"`."""
    numbers = sorted(int(n) for n in layers if n)
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
