"""The gated delta rule's kernels alone: widths, layouts, and T cut into segments."""

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from gated_delta_inputs import SEGMENTS, assert_close, make, outputs_and_gradients


@pytest.mark.parametrize(
    ("widths", "dtype", "implementation"),
    [
        ((96, 144), jnp.float32, "pallas"),
        ((128, 288), jnp.bfloat16, "pallas"),
        ((192, 64), jnp.float32, "pallas for a TPU"),
        ((256, 576), jnp.float32, "pallas"),
        ((96, 144), jnp.bfloat16, "pallas for a TPU"),
    ],
)
def test_widths_of_the_papers_grid(widths, dtype, implementation):
    inputs, cotangents = make(dtype, (1, 70, 1, 1, *widths), alike=0.5)
    got = outputs_and_gradients(inputs, None, cotangents, implementation)
    assert_close(got, oracle.gated_delta_rule(inputs, None, cotangents))


def test_segments_that_walk_side_by_side_equal_one_walk():
    inputs, cotangents = make(sizes=(1, 4100, 1, 1, 64, 64))  # 2 segments of 2112 tokens
    # A document over the cut, and one that ends just before the end.
    ids = np.repeat([[1, 2, 3, 0]], [1000, 2000, 1090, 10], axis=1).astype(np.int32)
    traced = outputs_and_gradients.trace(inputs, ids, cotangents, "pallas")
    assert "gated_delta_walk_homogeneous" in str(traced.jaxpr)
    got = outputs_and_gradients(inputs, ids, cotangents, "pallas")
    assert_close(got, oracle.gated_delta_rule(inputs, ids, cotangents))


def test_same_bits_wherever_a_row_stands_in_the_batch():
    inputs, cotangents = make(jnp.bfloat16, (3, 150, 1, 2, 64, 64))
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "pallas")
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), (inputs, SEGMENTS, cotangents))
    again = outputs_and_gradients(*rolled, "pallas")
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(jnp.roll(y, -1, axis=0)))
