"""The kernels of kda and dplr_delta_rule, interpreted, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import SEGMENTS, error
from vector_delta import CASES, SIZES, assert_close, forward, make, oracle, outputs_and_gradients

OPS = pytest.mark.parametrize("op", ["kda", "dplr"])


@pytest.mark.parametrize("case", CASES)
@OPS
def test_matches_the_recurrence_in_float64(op, case):
    inputs, cotangents = make(op, sizes=SIZES["pallas"], **CASES[case])
    got = outputs_and_gradients(op, inputs, SEGMENTS, cotangents, "pallas", 64)
    assert_close(op, got, oracle(op, inputs, SEGMENTS, cotangents))
    for x in (got[0], *got[2:-1]):
        assert not np.asarray(x)[SEGMENTS == 0].any()
    np.testing.assert_array_equal(got[1][2], inputs[-1][2])


@pytest.mark.parametrize("case", ["plain", "no decay, beta 1, keys alike", "decay 100"])
@OPS
def test_bfloat16_stays_within_its_rounding_on_a_tpu(op, case):
    inputs, cotangents = make(op, jnp.bfloat16, SIZES["pallas for a TPU"], **CASES[case])
    got = outputs_and_gradients(op, inputs, SEGMENTS, cotangents, "pallas for a TPU", 64)
    assert_close(op, got, oracle(op, inputs, SEGMENTS, cotangents))
    assert got[0].dtype == got[2].dtype == jnp.bfloat16
    assert got[1].dtype == got[-1].dtype == jnp.float32


def test_state_is_handed_over_at_any_split():
    op = "kda"
    inputs, _ = make(op, sizes=SIZES["pallas"])
    everywhere = np.ones(SEGMENTS.shape, np.int32)
    whole, state = forward(op, inputs, everywhere, "pallas", 64)
    for split in (1, 63, 64, 149):
        left_ids = everywhere * (np.arange(everywhere.shape[1]) < split)
        left, middle = forward(op, inputs, left_ids, "pallas", 64)
        right, last = forward(op, (*inputs[:-1], middle), 1 - left_ids, "pallas", 64)
        assert error(left + right, whole) < 2e-6
        assert error(last, state) < 2e-6


@OPS
def test_parts_of_a_key_and_columns_of_values_add_up(op):
    """96 keys are three parts on a GPU, 80 value columns two blocks of which one is padded."""
    inputs, cotangents = make(op, jnp.bfloat16, (1, 70, 1, 1, 96, 80), beta=1.0, alike=0.9)
    got = outputs_and_gradients(op, inputs, None, cotangents, "pallas", 64)
    assert_close(op, got, oracle(op, inputs, None, cotangents))


def test_no_writing_strength_has_its_gradient():
    inputs, cotangents = make("kda", sizes=SIZES["pallas"])
    q, k, v, g, beta, state = inputs
    beta = beta.at[:, ::3].set(0.0)
    inputs = (q, k, v, g, beta, state)
    got = outputs_and_gradients("kda", inputs, SEGMENTS, cotangents, "pallas", 64)
    assert_close("kda", got, oracle("kda", inputs, SEGMENTS, cotangents))


@OPS
def test_wild_decays_stay_finite(op):
    inputs, cotangents = make(op, sizes=SIZES["pallas"], decay=(1e-3, 1e4))
    got = outputs_and_gradients(op, inputs, SEGMENTS, cotangents, "pallas", 64)
    assert_close(op, got, oracle(op, inputs, SEGMENTS, cotangents))
