"""From documents to rows: windows, targets, segments, positions, masks."""

from collections import Counter

import numpy as np
import pytest

from jet_jax.data import load_tokenizer, make_valid_batches
from jet_jax.data.pack import Windows, to_batch


def segments(batches):
    """Takes rows apart again: the (tokens, targets) of each segment, with its checks."""
    for batch in batches:
        for row in range(len(batch["tokens"])):
            ids = batch["segment_ids"][row]
            used = int((ids > 0).sum())
            # Segments count 1, 2, ... from the left, padding comes last and is all zero.
            assert (np.diff(ids[:used], prepend=0) >= 0).all() and (np.diff(ids[:used]) <= 1).all()
            assert used == 0 or ids[0] == 1
            for name in ("tokens", "targets", "segment_ids", "positions", "loss_mask"):
                assert not batch[name][row, used:].any()
            assert (batch["loss_mask"][row, :used] == 1).all()
            for segment in range(1, ids.max() + 1):
                here = ids == segment
                np.testing.assert_array_equal(batch["positions"][row, here], np.arange(here.sum()))
                yield tuple(batch["tokens"][row, here]), tuple(batch["targets"][row, here])


def transitions(sequences):
    return Counter(pair for ids in sequences for pair in zip(ids[:-1], ids[1:], strict=True))


@pytest.mark.parametrize(
    ("length", "sizes"), [(0, []), (1, []), (2, [1]), (5, [4]), (6, [4, 1]), (9, [4, 4])]
)
def test_windows_cover_every_transition_once(length, sizes):
    ids = np.arange(100, 100 + length, dtype=np.int32)
    windows = Windows(4).flat_map(ids)
    assert [len(w["tokens"]) for w in windows] == sizes
    if windows:
        np.testing.assert_array_equal(np.concatenate([w["tokens"] for w in windows]), ids[:-1])
        np.testing.assert_array_equal(np.concatenate([w["targets"] for w in windows]), ids[1:])


def test_one_pass_has_the_corpus_and_nothing_else(make_config, tokenizer_dir, texts):
    """Counts every (token, next token) of the corpus; one across a border would be in excess."""
    tokenizer = load_tokenizer(tokenizer_dir)
    documents = [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for text in texts]
    config = make_config()
    batches = make_valid_batches(config, vocab_size=2048)
    pieces = list(segments(batches))
    assert all(tokens[1:] == targets[:-1] for tokens, targets in pieces)
    found = Counter(p for tokens, targets in pieces for p in zip(tokens, targets, strict=True))
    assert found == transitions(documents)
    assert max(len(d) for d in documents) > config.seq_len + 1  # some were cut
    assert any(batch["segment_ids"].max() > 1 for batch in batches)  # some share a row
    for batch in batches:
        for name, array in batch.items():
            assert array.shape == (config.batch_size, config.seq_len)
            assert array.dtype == (np.float32 if name == "loss_mask" else np.int32)


def test_rows_are_well_filled(make_config):
    """First-fit may not waste more than half of the full rows."""
    batches = make_valid_batches(make_config(seq_len=64), vocab_size=2048)
    used = np.concatenate([b["loss_mask"].mean(1) for b in batches])
    assert used[used > 0].mean() > 0.75


def test_rows_with_recurring_segments_are_refused():
    rows = {"tokens_segment_ids": np.asarray([[1, 1, 2, 1]]), "tokens": np.ones((1, 4), np.int32)}
    rows |= {"targets": rows["tokens"], "tokens_positions": np.asarray([[0, 1, 0, 0]])}
    with pytest.raises(ValueError, match="row 0, column 3: id 1 is lower than an id before it"):
        to_batch(rows)
