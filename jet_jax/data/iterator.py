"""The iterator a training run draws batches from, and its saved state.

A state is small and JSON-safe: it holds places in the pipeline and no text. Taking it up again
packs anew from the start of the rows in hand, so the next batches are exactly those that would
have followed.
"""

import json
import re
import weakref
from pathlib import Path
from typing import Any

import grain

from jet_jax.data.pack import Batch


def _places(state: Any) -> list[int]:
    """Returns every "next_index" in a Grain state: the documents taken, one number a reader."""
    if isinstance(state, dict):
        own = [state["next_index"]] if isinstance(state.get("next_index"), int) else []
        return own + [place for value in state.values() for place in _places(value)]
    if isinstance(state, list):
        return [place for value in state for place in _places(value)]
    return []


def _at_place(state: Any, place: int) -> Any:
    """Returns a copy of a Grain state with every reader moved to document `place` of its share."""
    if isinstance(state, dict):
        moved = {key: _at_place(value, place) for key, value in state.items()}
        return moved | ({"next_index": place} if isinstance(state.get("next_index"), int) else {})
    if isinstance(state, list):
        return [_at_place(value, place) for value in state]
    return state


def _release(pipeline: list[grain.DatasetIterator]) -> None:
    while pipeline:
        pipeline.pop().close()


class TrainIterator(grain.DatasetIterator):
    """Endless training batches of one process, as `pack.to_batch` describes them.

    `grain.checkpoint.CheckpointSave(iterator)` and `CheckpointRestore(iterator)` take it as it is;
    so does anything that keeps the JSON of `get_state()`, one a process.
    """

    def __init__(self, batches: grain.DatasetIterator, identity: dict[str, Any]):
        """Wraps a pipeline; `identity` is what must be equal for a state to fit (JSON-safe)."""
        super().__init__()
        self._identity = identity
        # Grain's prefetching iterator fails noisily if it outlives the modules it uses, so at exit
        # (or when this object goes) it is closed and let go, while they are still there.
        self._pipeline = [batches]
        self._finalizer = weakref.finalize(self, _release, self._pipeline)
        self._start = batches.get_state()

    def __next__(self) -> Batch:
        """Returns the next batch; never ends."""
        self._assert_not_closed()
        return next(self._pipeline[0])

    def start_prefetch(self) -> None:
        """Begins to make batches before the first is asked for."""
        self._pipeline[0].start_prefetch()

    def close(self) -> None:
        """Ends the threads or processes behind this iterator; no batch can be drawn after it."""
        super().close()
        self._finalizer()

    def get_state(self) -> dict[str, Any]:
        """Returns the place in the stream: the next batch is the first that is not yet drawn."""
        return {**self._identity, "grain": self._pipeline[0].get_state()}

    def set_state(self, state: dict[str, Any], *, approximate: bool = False) -> None:
        """Continues from a saved place: the next batches are those that would have followed.

        Args:
          state: what `get_state` gave, in this process of as many and with the same settings.
          approximate: also take a state of another number of processes, or of other settings, and
            continue near its place: at the same document of the same epoch, give or take what the
            processes differed by. Up to `pack_rows` rows a process are seen again. Any one old
            process's state does; give all new processes the same one.

        Raises:
          ValueError: the state is of another process or other settings; the message names them.
        """
        try:
            identity = {key: state[key] for key in self._identity}
            place = state["grain"]
        except (KeyError, TypeError):
            raise ValueError("this is not the state of a training data iterator") from None
        if identity == self._identity:
            self._pipeline[0].set_state(place)
        elif approximate:
            self._move(sum(_places(place)) * identity["process_count"])
        else:
            raise ValueError(self._difference(identity))

    def _move(self, documents: int) -> None:
        """Goes to where all processes together have taken `documents` documents."""
        readers = self._identity["process_count"] * len(_places(self._start))
        self._pipeline[0].set_state(_at_place(self._start, -(-documents // readers)))

    def _difference(self, saved: dict[str, Any]) -> str:
        def flat(identity):
            return {**identity, **identity["settings"]}

        now, then = flat(self._identity), flat(saved)
        changed = [
            f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(now.keys() | then.keys())
            if name != "settings" and now.get(name) != then.get(name)
        ]
        return (
            f"the saved data position does not fit this run: {', '.join(changed)}; go back to the "
            "old values, or continue near that position with set_state(..., approximate=True)"
        )


def load_state(directory: str | Path, process_index: int = 0, process_count: int = 1) -> dict:
    """Reads a state that `grain.checkpoint.CheckpointSave` wrote, whatever the process count then.

    Args:
      directory: the item's folder in the checkpoint (`STEP/data`).
      process_index: this process.
      process_count: number of processes now.

    Returns:
      This process's state; if another number of processes wrote the checkpoint, that of their
      first process, which `TrainIterator.set_state` takes with `approximate=True` only.

    Raises:
      ValueError: there is no state in `directory`.
    """
    directory = Path(directory)
    own = directory / f"process_{process_index}-of-{process_count}.json"
    firsts = sorted(directory.glob("process_0-of-*.json"))
    files = [own] if own.is_file() else [f for f in firsts if re.search(r"-of-\d+\.json$", f.name)]
    if not files:
        raise ValueError(f"no state of the training data in {directory}")
    return json.loads(files[0].read_text())
