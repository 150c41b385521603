"""The iterators a run draws batches from, and their saved state.

Training: documents shuffled anew each epoch, without end → this process's share → tokens → windows
→ packed rows → batches. `TrainIterator.get_state` is small and JSON-safe: it holds places in that
pipeline, no text, and `set_state` packs again from the start of the rows in hand.
"""

import json
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from grain import experimental

from jet_jax.data.config import DataConfig
from jet_jax.data.pack import Batch, Tokenize, Windows, pack, to_batch
from jet_jax.data.sources import TextSource
from jet_jax.data.tokenizer import load_tokenizer

_DOCUMENTS_AHEAD = 8  # documents read ahead by each thread
_PACK_TOKENS, _PACK_ROWS = 2**20, 512


def _documents(config: DataConfig, patterns: Sequence[str], vocab_size: int):
    source = TextSource(patterns, text_key=config.text_key, doc_separator=config.doc_separator)
    tokenizer = load_tokenizer(config.tokenizer, vocab_size)
    tokenize = Tokenize.make(tokenizer, config.add_bos, config.add_eos)
    # Without this, an endless pipeline over such documents would search forever.
    if not any(len(tokenize.map(source[i])) > 1 for i in range(len(source))):
        raise ValueError(
            f"no document in {', '.join(patterns)} has two tokens, so there is nothing to predict"
        )
    return source, tokenize


def _read(documents: grain.MapDataset, tokenize: Tokenize, config: DataConfig) -> grain.IterDataset:
    options = grain.ReadOptions(
        num_threads=config.num_threads,
        prefetch_buffer_size=_DOCUMENTS_AHEAD * config.num_threads,
    )
    tokens = documents.map(tokenize).to_iter_dataset(options)
    return experimental.FlatMapIterDataset(tokens, Windows(config.seq_len))


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


def make_train_iterator(
    config: DataConfig, *, process_index: int = 0, process_count: int = 1, vocab_size: int
) -> TrainIterator:
    """Makes the endless stream of training batches of one process.

    Process p of P takes documents p, p + P, ... of one shuffled order that all share.

    Args:
      config: what to read; every process gives the same.
      process_index: this process (`jax.process_index()`).
      process_count: number of processes (`jax.process_count()`).
      vocab_size: rows of the model's embedding.

    Returns:
      An iterator over batches of `config.batch_size / process_count` rows.

    Raises:
      ValueError: files are missing, of an unknown type, damaged, malformed or without text; the
        tokenizer is missing or larger than `vocab_size`; the batch does not divide.
    """
    rows = config.local_batch(process_index, process_count)
    source, tokenize = _documents(config, config.train, vocab_size)
    pack_rows = config.pack_rows or max(rows, min(_PACK_TOKENS // config.seq_len, _PACK_ROWS))
    documents = grain.MapDataset.source(source)
    if config.shuffle:
        documents = documents.shuffle(seed=config.seed)
    documents = documents.repeat()[process_index::process_count]
    packed = pack(
        _read(documents, tokenize, config),
        seq_len=config.seq_len,
        num_rows=pack_rows,
        shuffle=config.shuffle,
        seed=config.seed,
    )
    batches = packed.batch(rows, drop_remainder=True).map(to_batch)
    if config.num_workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=config.num_workers, per_worker_buffer_size=max(config.prefetch, 1)
            )
        )
    elif config.prefetch:
        batches = experimental.ThreadPrefetchIterDataset(
            batches, prefetch_buffer_size=config.prefetch
        )
    settings = config.stream_settings()
    settings |= {"add_bos": bool(tokenize.before), "pack_rows": pack_rows}
    settings |= {"documents": len(source), "bytes": source.num_bytes}
    settings |= {"token_ids": tokenize.backend.get_vocab_size()}
    return TrainIterator(
        iter(batches),
        {"process_index": process_index, "process_count": process_count, "settings": settings},
    )


def make_valid_batches(
    config: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int,
    max_batches: int | None = None,
) -> list[Batch]:
    """Makes the validation batches: one pass in order, the same whatever the process count.

    Every process packs the whole stream and keeps its rows of each batch, so all have equally many
    batches. They are kept in memory, 20 bytes a token.

    Args:
      config: what to read.
      process_index: this process.
      process_count: number of processes.
      vocab_size: rows of the model's embedding.
      max_batches: stop after so many; None takes all.

    Returns:
      Batches of `config.batch_size / process_count` rows; the last is filled up with padding
      (segment 0, loss_mask 0). Empty if `config.valid` is.

    Raises:
      ValueError: as `make_train_iterator`.
    """
    rows = config.local_batch(process_index, process_count)
    if not config.valid:
        return []
    source, tokenize = _documents(config, config.valid, vocab_size)
    packed = pack(
        _read(grain.MapDataset.source(source), tokenize, config),
        seq_len=config.seq_len,
        num_rows=config.batch_size,
        shuffle=False,
        seed=0,
    )
    batches = []
    mine = slice(process_index * rows, (process_index + 1) * rows)
    stream = iter(packed.batch(config.batch_size, drop_remainder=False).map(to_batch))
    while max_batches is None or len(batches) < max_batches:
        batch = next(stream, None)
        if batch is None:
            break
        missing = config.batch_size - len(batch["tokens"])
        batches.append(
            {name: np.pad(array, ((0, missing), (0, 0)))[mine] for name, array in batch.items()}
        )
    stream.close()
    return batches


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
