"""Scores of many paths through one supernet, without compiling anew for any of them.

Candidates go through `lax.map`, a chunk of them a call: under `vmap` a `switch` would compute every
branch. The teacher's hidden states of a batch are computed once for all candidates of a chunk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jet_jax import sharding
from jet_jax.evaluation.scoring import (
    item_sums,
    perplexity_by_bucket,
    summarise,
    summarise_buckets,
    token_scores,
)
from jet_jax.postnas.objectives import Objective
from jet_jax.postnas.supernet import Supernet, shardings

Choices = tuple[int, ...]  # a path as a key
Results = dict[str, Any]


@dataclass
class PathScorer:
    """Scores paths by objectives and remembers them: `scorer(paths) -> {path: {name: results}}`.

    Attributes:
      net: the supernet.
      params: its weights.
      objectives: what to score by.
      mesh: the mesh that the weights lie on.
      batch_size: rows at a time.
      chunk: candidates a call.
      advance: called with the number of paths that a call has scored, from 0 and after each chunk,
        and of all that it will score.
      known: what has been scored; saved with `table` and filled again on a resume.
    """

    net: Supernet
    params: Mapping[str, Any]
    objectives: Sequence[Objective]
    mesh: Mesh
    batch_size: int = 8
    chunk: int = 16
    advance: Callable[[int, int], None] = lambda done, total: None
    known: dict[Choices, dict[str, Results]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._saved = 0
        where = shardings(self.params, self.mesh), sharding.replicated(self.mesh)
        batch = sharding.batch_sharding(self.mesh)
        self._sums = jax.jit(
            partial(_sums, self.net),
            static_argnums=3,
            in_shardings=(*where, batch),
            out_shardings=sharding.replicated(self.mesh),
        )

    def __call__(self, paths: Iterable[Any]) -> dict[Choices, dict[str, Results]]:
        """Scores what is not known yet.

        Args:
          paths: int [L] each.

        Returns:
          For each path and objective's name what `summarise` gives, and `buckets`.
        """
        wanted = [tuple(int(x) for x in path) for path in paths]
        missing = [path for path in dict.fromkeys(wanted) if path not in self.known]
        if missing:
            self.advance(0, len(missing))
        for start in range(0, len(missing), self.chunk):
            part = missing[start : start + self.chunk]
            self._score(part)
            self.advance(start + len(part), len(missing))
        return {path: self.known[path] for path in wanted}

    def _score(self, part: list[Choices]) -> None:
        filled = np.array(part + [part[0]] * (self.chunk - len(part)), np.int32)
        found: list[dict[str, Results]] = [{} for _ in part]
        with jax.set_mesh(self.mesh):
            for objective in self.objectives:
                total = None
                for batch in objective.rows.batches(self.batch_size):
                    batch = sharding.put_batch(batch, self.mesh)
                    sums = self._sums(self.params, filled, batch, objective.rows.num_items)
                    sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
                    total = sums if total is None else jax.tree.map(np.add, total, sums)
                for i, results in enumerate(found):
                    items, buckets = jax.tree.map(lambda x, i=i: x[i], total)
                    summary = summarise(objective.rows, items)
                    del summary["per_item"]  # questions are enough, and thousands of paths add up
                    summary["buckets"] = summarise_buckets(buckets)
                    results[objective.name] = summary
        self.known |= dict(zip(part, found, strict=True))

    def save(self, path: os.PathLike) -> None:
        """Writes all that is known, a JSON line a path, so that a search that is killed goes on.

        The first call replaces the file; those after it add what has come since, as thousands of
        paths are too much to write anew for every chunk.

        Args:
          path: the file, the same for all calls.
        """
        rows = [
            json.dumps({"path": list(key), "results": jax.tree.map(_plain, found)}) + "\n"
            for key, found in islice(self.known.items(), self._saved, None)
        ]
        if self._saved:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(rows))
        else:
            part = Path(f"{os.fspath(path)}.part")
            part.write_text("".join(rows), encoding="utf-8")
            part.replace(path)
        self._saved += len(rows)

    def load(self, path: os.PathLike) -> None:
        """Takes over what `save` wrote, but for a last line that was cut short."""
        *lines, _ = Path(path).read_text(encoding="utf-8").split("\n")
        for row in map(json.loads, lines):
            found = row["results"]
            for results in found.values():
                results["per_question"] = {
                    k: np.asarray(v) for k, v in results["per_question"].items()
                }
            self.known[tuple(row["path"])] = found

    def check_teacher(self) -> dict[str, float]:
        """Scores the teacher and sees whether it passes every objective's gate.

        Returns:
          Its figures by objective.

        Raises:
          ValueError: it does not pass one.
        """
        path = tuple(int(x) for x in self.net.teacher_path)
        results = self([path])[path]
        for objective in self.objectives:
            objective.check_gate(results[objective.name])
        return {o.name: o.value(results[o.name]) for o in self.objectives}

    def objective(self, name: str) -> Objective:
        """The objective of that name. Raises ValueError, listing the names, if there is none."""
        for objective in self.objectives:
            if objective.name == name:
                return objective
        known = ", ".join(objective.name for objective in self.objectives)
        raise ValueError(f"no objective is called {name!r}; there are {known}")


def _plain(x: Any) -> Any:
    return x.tolist() if isinstance(x, np.ndarray) else x


def _sums(net, params, paths, batch, num_items):
    """Sums over the items and the position buckets of a batch: a leading axis of candidates."""
    tokens, segment_ids, positions = (batch[k] for k in ("tokens", "segment_ids", "positions"))
    head = net.head_kernel(params)
    run = partial(net.run, tokens=tokens, segment_ids=segment_ids, positions=positions)
    # The teacher as it was, also where a copy of its attention has been trained.
    untrained = {name: part for name, part in params.items() if name != "full"}
    reference, _ = run(untrained, jnp.asarray(net.teacher_path))

    def one(path):
        hidden, _ = run(params, path)
        scores = token_scores(hidden, head, batch["targets"], reference, head)
        answers = batch["answers"]
        return (
            item_sums(scores, answers, num_items),
            perplexity_by_bucket(scores, positions, answers != 0),
        )

    return jax.lax.map(one, paths)
