"""Batches of a run: epochs, processes, and positions that are saved and taken up again."""

import itertools
import json
from collections import Counter

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jet_jax.data import (
    DataConfig,
    load_state,
    load_tokenizer,
    make_train_iterator,
    make_valid_batches,
)


def train(config, **options):
    return make_train_iterator(config, vocab_size=2048, **options)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def differ(left, right):
    return any((a["tokens"] != b["tokens"]).any() for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def first_ids(texts, tokenizer_dir):
    """Maps the first ids of a document to its number."""
    tokenizer = load_tokenizer(tokenizer_dir)
    return {tuple(tokenizer.encode(text)[:4].tolist()): i for i, text in enumerate(texts)}


def documents(batches, first_ids):
    """Lists the numbers of the documents that begin in `batches`."""
    found = []
    for batch in batches:
        for row, at in np.argwhere((batch["positions"] == 0) & (batch["segment_ids"] > 0)):
            found.append(first_ids.get(tuple(batch["tokens"][row, at : at + 4].tolist())))
    return [d for d in found if d is not None]  # None: a later window of a long document


def test_seed_decides_the_order(make_config):
    batches = take(train(make_config()), 12)
    assert_same(take(train(make_config()), 12), batches)
    assert differ(take(train(make_config(seed=4)), 12), batches)


def test_each_epoch_has_every_document_once_in_a_new_order(make_config, texts, first_ids):
    # One row at a time keeps the order of the documents; a long row ends no epoch early.
    config = make_config(seq_len=64, pack_rows=1, batch_size=1)
    order = documents(take(train(config), 60), first_ids)
    count = len(texts)
    assert len(order) > 2 * count
    first, second = order[:count], order[count : 2 * count]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second and first != sorted(first)
    other = make_config(seq_len=64, pack_rows=1, batch_size=1, seed=4)
    assert documents(take(train(other), 30), first_ids)[:count] != first
    fixed = make_config(seq_len=64, pack_rows=1, batch_size=1, shuffle=False)
    order = documents(take(train(fixed), 60), first_ids)
    assert order[: 2 * count] == [*range(count), *range(count)]


def test_processes_share_the_documents_of_an_epoch(make_config, texts, first_ids):
    config = make_config(seq_len=64, pack_rows=2, batch_size=4)
    taken = [
        documents(take(train(config, process_index=i, process_count=2), 12), first_ids)
        for i in range(2)
    ]
    half = len(texts) // 2
    assert min(map(len, taken)) > half + 4
    # Rows are shuffled in pairs, so the start of the second epoch may come a little early.
    early = Counter(taken[0][: half - 4]) + Counter(taken[1][: half - 4])
    assert max(early.values()) == 1
    assert all(batch["tokens"].shape == (2, 64) for batch in
               take(train(config, process_index=1, process_count=2), 2))  # fmt: skip
    fixed = make_config(seq_len=64, pack_rows=2, batch_size=4, shuffle=False)
    for i in range(2):
        numbers = documents(take(train(fixed, process_index=i, process_count=2), 12), first_ids)
        assert set(numbers) == set(range(i, len(texts), 2))


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resumes_exactly(make_config, threads, prefetch):
    """Stops after every batch of more than an epoch: within packed rows, documents, at borders."""
    config = make_config(num_threads=threads, prefetch=prefetch)
    whole = train(config)
    batches, states = [], [json.dumps(whole.get_state())]
    for _ in range(24):
        batches.append(next(whole))
        states.append(json.dumps(whole.get_state()))
    epoch = json.loads(states[-1])["grain"]["parent"]["parent"]["next_index"] / 24
    assert epoch > 1.2
    resumed = train(config)
    for at in range(21):
        resumed.set_state(json.loads(states[at]))
        assert_same(take(resumed, 3), batches[at : at + 3])
    fresh = train(config)  # not one that has run before
    fresh.set_state(json.loads(states[7]))
    assert_same(take(fresh, 10), batches[7:17])


def test_resumes_from_an_orbax_checkpoint(make_config, tmp_path):
    config = make_config()
    whole = train(config)
    take(whole, 5)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        data = grain.checkpoint.CheckpointSave(whole)
        manager.save(5, args=ocp.args.Composite(data=data))
        following = take(whole, 4)  # while it may still be writing
        manager.wait_until_finished()
        resumed = train(config)
        data = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(5, args=ocp.args.Composite(data=data))
    assert_same(take(resumed, 4), following)
    again = train(config)
    again.set_state(load_state(tmp_path / "run" / "5" / "data"))
    assert_same(take(again, 4), following)
    with pytest.raises(ValueError, match="no state of the training data in"):
        load_state(tmp_path)


def test_another_process_count_is_refused_or_approximated(make_config, tmp_path, first_ids):
    config = make_config(seq_len=64, pack_rows=2, batch_size=4, shuffle=False)
    one = train(config)
    take(one, 3)
    (tmp_path / "process_0-of-1.json").write_text(json.dumps(one.get_state()))
    seen = documents(take(train(config), 3), first_ids)
    following = []
    for i in range(2):
        iterator = train(config, process_index=i, process_count=2)
        state = load_state(tmp_path, i, 2)
        with pytest.raises(
            ValueError, match="process_count was 1 and is 2.*; go back .*approximate"
        ):
            iterator.set_state(state)
        iterator.set_state(state, approximate=True)
        following += documents(take(iterator, 1), first_ids)
    # What two rows hold (8 documents at most) may come again; nothing is left out.
    starts = range(len(seen) - 8, len(seen) + 1)
    expected = [sorted(d % 24 for d in range(at, at + len(following))) for at in starts]
    assert 24 < len(seen) and len(following) > 12
    assert sorted(following) in expected


def test_other_settings_are_refused(make_config, texts, tmp_path):
    state = train(make_config()).get_state()
    with pytest.raises(ValueError, match="seed was 3 and is 5, seq_len was 12 and is 13; go back"):
        train(make_config(seed=5, seq_len=13)).set_state(state)
    (tmp_path / "fewer.txt").write_text("\n".join(texts[:-1]))
    with pytest.raises(ValueError, match="bytes was .* documents was 24 and is 23"):
        train(make_config(train=(str(tmp_path / "fewer.txt"),))).set_state(state)
    with pytest.raises(ValueError, match="not the state of a training data iterator"):
        train(make_config()).set_state({"next_index": 3})


def test_a_closed_iterator_gives_nothing(make_config):
    iterator = train(make_config())
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_validation_is_one_pass_whatever_the_process_count(make_config):
    config = make_config()
    batches = make_valid_batches(config, vocab_size=2048)
    assert len(batches) > 3
    assert not batches[-1]["segment_ids"][-1].any()  # the last one is filled up
    assert_same(make_valid_batches(config, vocab_size=2048), batches)
    assert_same(make_valid_batches(config, vocab_size=2048, max_batches=2), batches[:2])
    shares = [
        make_valid_batches(config, process_index=i, process_count=2, vocab_size=2048)
        for i in range(2)
    ]
    joined = [
        {k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*shares, strict=True)
    ]  # fmt: skip
    assert_same(joined, batches)
    assert make_valid_batches(make_config(valid=()), vocab_size=2048) == []


def test_refused_runs(make_config, tmp_path):
    with pytest.raises(ValueError, match="has 2048 token ids, .*vocab_size is 2000"):
        make_train_iterator(make_config(), vocab_size=2000)
    for make in (make_train_iterator, make_valid_batches):
        with pytest.raises(ValueError, match="batch_size=4 rows cannot be shared by 3 processes"):
            make(make_config(), process_count=3, vocab_size=2048)
        with pytest.raises(ValueError, match="process_index=2 is not below process_count=2"):
            make(make_config(), process_index=2, process_count=2, vocab_size=2048)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    config = make_config(train=str(tmp_path / "a.jsonl"), add_eos=False)
    with pytest.raises(ValueError, match=r"no document in .*a\.jsonl has two tokens"):
        train(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": ()}, "data.train is empty"),
        ({"tokenizer": ""}, "data.tokenizer is not set"),
        ({"seq_len": 0}, "data.seq_len=0 must be an integer of at least 1"),
        ({"batch_size": True}, "data.batch_size=True must be an integer"),
        ({"pack_rows": 0}, "data.pack_rows=0"),
        ({"num_threads": -1}, "data.num_threads=-1 must be an integer of at least 0"),
        ({"seed": -1}, r"data.seed=-1 must be an integer from 0 to 2\*\*32 - 1"),
        ({"text_key": ""}, "data.text_key is empty"),
    ],
)
def test_refused_settings(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**({"train": ("a.txt",), "tokenizer": "t"} | options))


def test_config_takes_one_path_or_a_list():
    assert DataConfig(train="a.txt", tokenizer="t").train == ("a.txt",)
    config = DataConfig(train=["a.txt", "b"], valid=["c"], tokenizer="t")
    assert (config.train, config.valid) == (("a.txt", "b"), ("c",))
    assert hash(config) == hash(DataConfig(train=("a.txt", "b"), valid="c", tokenizer="t"))
