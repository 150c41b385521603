"""Retrieval rows say their answers, at a distance; splits share no row; seeds repeat."""

import functools

import numpy as np
import pytest

from jet_jax.evaluation import retrieval

GAP, LENGTH = 12, 160
RANGE = range(1, 130)


@pytest.fixture(scope="module")
def tasks(tokenizer, documents):
    """Each task as a function of seed, rows, length and options."""
    bind = functools.partial
    return {
        "mqar": bind(retrieval.mqar, tokenizer),
        "mqar in text": bind(retrieval.mqar, tokenizer, documents=documents),
        "mqar in ids": bind(retrieval.mqar, RANGE),
        "copy": bind(retrieval.copy, tokenizer),
        "copy of ids": bind(retrieval.copy, RANGE),
        "phone_book": bind(retrieval.phone_book, tokenizer, num_queries=2),
        "needle": bind(retrieval.needle, tokenizer, num_needles=2),
        "needle in text": bind(retrieval.needle, tokenizer, documents=documents),
        "extraction": bind(retrieval.extraction, tokenizer, documents),
    }


NAMES = ["mqar", "mqar in text", "mqar in ids", "copy", "copy of ids", "phone_book", "needle"]
NAMES += ["needle in text", "extraction"]


def answers_of(rows):
    """Of each item: the tokens before its answer, and the answer."""
    for item in range(1, rows.num_items + 1):
        (row,) = set(np.argwhere(rows.answers == item)[:, 0])
        (at,) = np.nonzero(rows.answers[row] == item)
        np.testing.assert_array_equal(at, np.arange(at[0], at[-1] + 1))
        yield rows.tokens[row, : at[0] + 1].tolist(), rows.targets[row, at].tolist()


def look_up(before, size):
    """What follows the earlier place that ends like the prompt, over the longest common ending.

    Returns the continuation and the tokens between its end and the end of the prompt.
    """

    def common(end):
        n = 0
        while n < end and before[end - 1 - n] == before[-1 - n]:
            n += 1
        return n

    end = max(range(1, len(before)), key=common)
    return before[end : end + size], len(before) - (end + size)


@pytest.mark.parametrize("name", NAMES)
def test_rows_hold_their_answers_at_a_distance(name, tasks):
    rows = tasks[name](3, 6, LENGTH, min_gap=GAP)
    assert rows.tokens.shape == (6, LENGTH)
    count = 0
    for before, answer in answers_of(rows):
        found, gap = look_up(before, len(answer))
        assert found == answer
        assert gap >= GAP
        count += 1
    assert count == rows.num_items >= 6
    if "phone" not in name and "copy" not in name:
        assert (rows.segment_ids == 1).all()  # exactly as long as asked for


@pytest.mark.parametrize("name", NAMES)
def test_rows_depend_on_seed_and_split_alone(name, tasks):
    same, again = (tasks[name](5, 4, LENGTH, split="tuning") for _ in range(2))
    np.testing.assert_array_equal(same.tokens, again.tokens)
    np.testing.assert_array_equal(same.answers, again.answers)
    texts = {same.tokens.tobytes()}
    texts |= {tasks[name](6, 4, LENGTH, split="tuning").tokens.tobytes()}
    texts |= {tasks[name](5, 4, LENGTH, split=s).tokens.tobytes() for s in ("search", "test")}
    assert len(texts) == 4


def test_splits_share_no_row_where_there_are_few():
    """A row is one of 108: two pairs of three keys and values, a query, no filler."""
    options = dict(num_pairs=2, num_queries=1, min_gap=0)
    sets = []
    for split in ("search", "tuning", "test"):
        rows = retrieval.mqar(range(9), 0, 20, 5, split=split, **options)
        sets.append({tuple(row) for row in np.concatenate([rows.tokens, rows.targets], 1)})
    assert [len(s) for s in sets] == [20] * 3
    assert len(set.union(*sets)) == 60
    with pytest.raises(ValueError, match="different rows of 60"):
        retrieval.mqar(range(9), 0, 60, 5, **options)


def test_extraction_takes_all_documents_where_no_split_is_named(tokenizer, documents):
    rows = retrieval.extraction(tokenizer, documents[:1], 0, 4, LENGTH, split=None)
    (source,) = [tokenizer.decode(tokenizer.encode(text)) for text in documents[:1]]
    for _, answer in answers_of(rows):
        assert tokenizer.decode(answer) in source


def test_depths_vary(tokenizer):
    rows = retrieval.needle(tokenizer, 0, 30, LENGTH)
    depths = [len(before) - look_up(before, 6)[1] for before, _ in answers_of(rows)]
    assert min(depths) < LENGTH // 3 and max(depths) > LENGTH // 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, d: retrieval.mqar(t, 0, 2, 30), "set length to at least 55"),
        (lambda t, d: retrieval.mqar(range(10), 0, 2, 99), "holds 3 keys, fewer than num_pairs=8"),
        (lambda t, d: retrieval.mqar(t, 0, 2, 99, num_queries=9), "exceeds num_pairs"),
        (lambda t, d: retrieval.mqar(t, 0, 2, 99, words=["sister", "antidote"]), "splits 'antid"),
        (lambda t, d: retrieval.mqar(t, 0, 2, 99, words=["sister", "brother"]), "16 words of one"),
        (lambda t, d: retrieval.mqar(t, 0, 2, 99, split="train"), "use one of search"),
        (lambda t, d: retrieval.mqar(t, 0, 0, 99), "num_rows=0"),
        (lambda t, d: retrieval.copy(t, 0, 2, 12), "too short"),
        (lambda t, d: retrieval.phone_book(t, 0, 2, 20), "too short"),
        (lambda t, d: retrieval.phone_book(t, 0, 2, 99, num_entries=1), "min_gap"),
        (lambda t, d: retrieval.needle(t, 0, 2, 20), "length=20 is too short for 1 needles"),
        (lambda t, d: retrieval.needle(t, 0, 2, 99, documents=[]), "no text"),
        (lambda t, d: retrieval.extraction(t, [], 0, 2, 99), "list of documents is empty"),
        (lambda t, d: retrieval.extraction(t, d, 0, 2, 30), "set it to at least"),
        (lambda t, d: retrieval.extraction(t, d, 0, 2, 9999), "longest of"),
    ],
)
def test_bad_input_is_named(call, message, tokenizer, documents):
    with pytest.raises(ValueError, match=message):
        call(tokenizer, documents)
