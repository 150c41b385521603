"""One suite over the implementations of the gated delta rule, against float64 NumPy."""

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from gated_delta_inputs import (
    CASES,
    SEGMENTS,
    SIZES,
    assert_close,
    error,
    forward,
    make,
    outputs_and_gradients,
)

from kernels_pallas import gated_delta_rule, gated_delta_step
from kernels_pallas.gated_delta_rule.chunk_math import unit_lower_inverse

IMPLEMENTATIONS = ["reference", "xla", "pallas"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_the_recurrence_in_float64(implementation, case):
    inputs, cotangents = make(sizes=SIZES[implementation], **CASES[case])
    got = outputs_and_gradients(inputs, None, cotangents, implementation)
    assert_close(got, oracle.gated_delta_rule(inputs, None, cotangents))


@pytest.mark.parametrize("case", ["plain", "keys alike", "weak beside strong decay"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_bfloat16_stays_within_its_rounding(implementation, case):
    inputs, cotangents = make(jnp.bfloat16, SIZES[implementation], **CASES[case])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, implementation)
    assert_close(got, oracle.gated_delta_rule(inputs, SEGMENTS, cotangents))
    assert got[0].dtype == got[2].dtype == jnp.bfloat16
    assert got[1].dtype == got[5].dtype == jnp.float32


@pytest.mark.parametrize("case", ["keys alike", "no decay, beta 1, keys alike"])
def test_kernels_round_no_sums_that_cancel(case):
    """Summing P diag(β) N with N rounded, not Y E, would put o and dv off by 6e-3."""
    inputs, cotangents = make(jnp.bfloat16, SIZES["pallas"], **CASES[case])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "pallas")
    expected = oracle.gated_delta_rule(inputs, SEGMENTS, cotangents)
    o, _, _, _, dv, _, dbeta, _ = (error(x, y) for x, y in zip(got, expected, strict=True))
    assert o < 4.5e-3 and dv < 5e-3 and dbeta < 7e-3


@pytest.mark.parametrize("case", ["plain", "strong decay", "no decay, beta 1, keys alike"])
@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "pallas for a TPU"])
def test_packed_and_padded_rows_equal_their_documents_alone(implementation, case):
    inputs, cotangents = make(sizes=SIZES[implementation], **CASES[case])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, implementation)
    assert_close(got, oracle.gated_delta_rule(inputs, SEGMENTS, cotangents))
    for x in (got[0], *got[2:7]):
        assert not np.asarray(x)[SEGMENTS == 0].any()
    np.testing.assert_array_equal(got[1][2], inputs[5][2])


def test_default_chunk_with_a_ragged_end_and_borders_inside():
    sizes = (1, 150, 1, 2, 16, 8)
    inputs, cotangents = make(sizes=sizes, alike=0.5)
    segments = np.repeat([[1, 2, 3, 4, 0]], [70, 1, 10, 60, 9], axis=1).astype(np.int32)
    got = outputs_and_gradients(inputs, segments, cotangents, "xla", chunk_size=64)
    assert_close(got, oracle.gated_delta_rule(inputs, segments, cotangents))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_is_handed_over_at_any_split(implementation):
    inputs, _ = make(sizes=SIZES[implementation])
    everywhere = np.ones(SEGMENTS.shape, np.int32)
    whole, state = forward(inputs, everywhere, implementation)
    for split in (1, 15, 16, 63, 64, 65, 149):
        left_ids = everywhere * (np.arange(everywhere.shape[1]) < split)
        left, middle = forward(inputs, left_ids, implementation)
        right, last = forward((*inputs[:5], middle), 1 - left_ids, implementation)
        assert error(left + right, whole) < 2e-6
        assert error(last, state) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_equal_the_sequence(implementation):
    (q, k, v, g, beta, state), cotangents = make(sizes=SIZES[implementation])
    expected = oracle.gated_delta_rule((q, k, v, g, beta, state), None, cotangents)

    @jax.jit
    def steps(state, tokens):
        def step(state, token):
            o, state = gated_delta_step(
                *token, state, use_qk_l2norm=True, implementation=implementation
            )
            return state, o

        return jax.lax.scan(step, state, tokens)

    state, o = steps(state, [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta)])
    assert error(jnp.moveaxis(o, 0, 1), expected[0]) < 2e-6
    assert error(state, expected[1]) < 2e-6

    small = state.astype(jnp.bfloat16)
    token = [x[None, :, 0] for x in (q, k, v, 0 * g, 0 * beta)]
    kept, o = steps(small, token)
    assert o.dtype == jnp.float32 and kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept, small)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_defaults_no_decay_no_norm_own_scale(implementation):
    (q, k, v, g, beta, state), cotangents = make(sizes=SIZES[implementation], alike=0.9)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    expected = oracle.gated_delta_rule(
        (q, k, v, 0 * g, beta, 0 * state), None, cotangents, scale=0.3, use_qk_l2norm=False
    )
    o, last = jax.jit(
        lambda *x: gated_delta_rule(
            *x, scale=0.3, state_dtype=jnp.bfloat16, implementation=implementation
        )
    )(q, k, v, None, beta)
    assert error(o, expected[0]) < 2e-6
    assert last.dtype == jnp.bfloat16 and error(last, expected[1]) < 4e-3
    zeros = jnp.zeros_like(state)
    options = dict(scale=0.3, implementation=implementation)
    o, _ = gated_delta_step(q[:, 0], k[:, 0], v[:, 0], None, beta[:, 0], zeros, **options)
    assert error(o, expected[0][:, 0]) < 2e-6


@pytest.mark.parametrize("size", [16, 64, 256])
def test_inverse_holds_where_keys_are_equal(size):
    a = np.tril(np.ones((2, size, size)), -1) * np.array([1.0, 0.9])[:, None, None]
    got = unit_lower_inverse(jnp.asarray(a, jnp.float32))
    assert error(got, np.linalg.inv(np.eye(size) + a)) < 1e-6
