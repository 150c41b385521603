"""The batches of a run: pipelines from files to batches for training and validation.

Training: documents shuffled anew each epoch, without end → this process's share → tokens → windows
→ packed rows → batches. Validation: one pass in order, shared out batch by batch.
"""

from collections.abc import Sequence

import grain
import numpy as np
from grain import experimental

from jet_jax.data.config import DataConfig
from jet_jax.data.iterator import TrainIterator
from jet_jax.data.pack import Batch, Tokenize, Windows, pack, to_batch
from jet_jax.data.sources import TextSource
from jet_jax.data.tokenizer import load_tokenizer

_DOCUMENTS_AHEAD = 8  # documents read ahead by each thread
_PACK_TOKENS, _PACK_ROWS = 2**20, 512


def _documents(config: DataConfig, patterns: Sequence[str], vocab_size: int | None):
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


def make_train_iterator(
    config: DataConfig,
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int | None = None,
) -> TrainIterator:
    """Makes the endless stream of training batches of one process.

    Process p of P takes documents p, p + P, ... of one shuffled order that all share.

    Args:
      config: what to read; every process gives the same.
      process_index: this process (`jax.process_index()`).
      process_count: number of processes (`jax.process_count()`).
      vocab_size: rows of the model's embedding; None leaves the tokenizer unchecked.

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
    process_index: int = 0,
    process_count: int = 1,
    vocab_size: int | None = None,
    max_batches: int | None = None,
) -> list[Batch]:
    """Makes the validation batches: one pass in order, the same whatever the process count.

    Every process packs the whole stream and keeps its rows of each batch, so all have equally many
    batches. They are kept in memory, 20 bytes a token.

    Args:
      config: what to read.
      process_index: this process.
      process_count: number of processes.
      vocab_size: rows of the model's embedding; None leaves the tokenizer unchecked.
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
