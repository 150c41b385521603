"""Rows: packing, positions, batches, and what they refuse."""

import dataclasses

import numpy as np
import pytest

from jet_jax.evaluation.rows import Passage, pack


@pytest.fixture
def rows():
    """Passages of 3, 5 and 2 positions in rows of 5: the third goes beside the first."""
    first = Passage([1, 2]).ask([3]).write([4])
    second = Passage([5]).ask([6, 7]).write([8]).ask([9, 10])
    third = Passage([11, 12]).ask([13])
    return pack([first, second, third], 5, name="three")


def test_passages_are_packed_whole_with_items_in_their_order(rows):
    np.testing.assert_array_equal(rows.tokens, [[1, 2, 3, 11, 12], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(rows.targets, [[2, 3, 4, 12, 13], [6, 7, 8, 9, 10]])
    np.testing.assert_array_equal(rows.segment_ids, [[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(rows.answers, [[0, 1, 0, 0, 4], [2, 2, 0, 3, 3]])
    np.testing.assert_array_equal(rows.positions, [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    assert rows.num_items == 4 and not rows.has_choices


def test_the_last_batch_is_filled_with_empty_rows():
    rows = pack([Passage([i, 1]).ask([2]) for i in range(3)], 3, name="padded")
    assert (rows.segment_ids[:, 2] == 0).all() and (rows.positions[:, 2] == 0).all()
    first, last = rows.batches(2)
    assert all(x.shape == (2, 3) and x.dtype == np.int32 for x in [*first.values(), *last.values()])
    np.testing.assert_array_equal(last["tokens"], [[2, 1, 0], [0, 0, 0]])
    assert not last["segment_ids"][1].any() and not last["answers"][1].any()


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "no passages"),
        ([Passage([1]).ask([2, 3, 4])], "set length to 3"),
        ([Passage().ask([2, 3])], "needs a prompt"),
        ([Passage([1, 2])], "needs a prompt and an answer"),
    ],
)
def test_passages_that_do_not_fit_are_refused(passages, message):
    with pytest.raises(ValueError, match=message):
        pack(passages, 2, name="bad")


def test_inconsistent_rows_are_refused(rows):
    for changes, message in (
        ({"answers": rows.answers * 2}, "each of 1 to 4"),
        ({"segment_ids": rows.segment_ids * 0}, "lies on padding"),
        ({"right": np.array([True, True, True, False])}, "exactly one right"),
        (
            {
                "groups": np.array([0, 0, 1, 2], np.int32),
                "right": np.array([True, False, True, True]),
            },
            "two sets",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(rows, **changes)
