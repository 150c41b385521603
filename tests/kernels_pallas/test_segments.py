import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import (
    segment_ordinals,
    segment_positions,
    segment_starts,
    validate_segment_ids,
)

IDS = np.array(
    [[0, 0, 3, 3, 3, 5, 0, 0, 6, 6, 0], [1] * 11, [0] * 11, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0]],
    np.int32,
)


def test_starts_ordinals_and_positions():
    starts = [[0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0], [1] + [0] * 10, [0] * 11, [1] * 10 + [0]]
    ordinals = [[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0] * 11, [0] * 11, [*range(10), 9]]
    positions = [[0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0], [*range(11)], [0] * 11, [0] * 11]
    ids = jnp.asarray(IDS)
    np.testing.assert_array_equal(segment_starts(ids), np.array(starts, bool))
    np.testing.assert_array_equal(segment_ordinals(ids), ordinals)
    np.testing.assert_array_equal(segment_positions(ids), positions)


@pytest.mark.parametrize("ids", [IDS, IDS[:0], IDS[:, :1], np.zeros((2, 0), np.int64)])
def test_valid_rows_pass(ids):
    validate_segment_ids(ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 1, 2], [2, 1, 1]], "row 1, column 1: id 1 is lower than an id before it"),
        ([[1, 2, 1]], "row 0, column 2: id 1 is lower"),
        ([[1, 2, 0, 1]], "row 0, column 3: id 1 is lower"),
        ([[1, 1, 0, 1]], "row 0, column 3: id 1 recurs after padding"),
        ([[0, 1, -1]], "row 0, column 2: id -1 is negative"),
        ([1, 1, 0], r"shape \(3,\) .*expected integers \[B, T\]"),
        ([[1.0, 1.0]], "dtype float64, expected integers"),
    ],
)
def test_invalid_rows_are_refused_with_row_and_id(ids, message):
    with pytest.raises(ValueError, match=message):
        validate_segment_ids(np.array(ids))
