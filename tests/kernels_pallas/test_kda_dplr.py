"""One suite over the implementations of kda and dplr_delta_rule, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import SEGMENTS, error
from vector_delta import (
    CASES,
    OPS,
    STEPS,
    assert_close,
    forward,
    make,
    oracle,
    outputs_and_gradients,
)

IMPLEMENTATIONS = ["reference", "xla"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_matches_the_recurrence_in_float64(op, implementation, case):
    inputs, cotangents = make(op, **CASES[case])
    got = outputs_and_gradients(op, inputs, SEGMENTS, cotangents, implementation, 64)
    assert_close(op, got, oracle(op, inputs, SEGMENTS, cotangents))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_steps_equal_the_sequence(op, implementation):
    inputs, cotangents = make(op)
    expected = oracle(op, inputs, None, cotangents)
    *inputs, state = inputs
    options = dict(use_qk_l2norm=True) if op == "kda" else {}

    @jax.jit
    def steps(state, tokens):
        def step(state, token):
            o, state = STEPS[op](*token, state, implementation=implementation, **options)
            return state, o

        return jax.lax.scan(step, state, tokens)

    state, o = steps(state, [jnp.moveaxis(x, 1, 0) for x in inputs])
    assert error(jnp.moveaxis(o, 0, 1), expected[0]) < 2e-6
    assert error(state, expected[1]) < 2e-6

    small = state.astype(jnp.bfloat16)
    idle = [x[None, :, 0] for x in inputs]
    writes = (3, 4) if op == "kda" else (1, 4, 5)  # g and beta; k, b and g
    idle = [0 * x if i in writes else x for i, x in enumerate(idle)]
    kept, o = steps(small, idle)
    assert o.dtype == jnp.float32 and kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept, small)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_state_is_handed_over_at_any_split(op, implementation):
    inputs, _ = make(op)
    everywhere = np.ones(SEGMENTS.shape, np.int32)
    whole, state = forward(op, inputs, everywhere, implementation, 64)
    for split in (1, 15, 16, 63, 64, 65, 149):
        left_ids = everywhere * (np.arange(everywhere.shape[1]) < split)
        left, middle = forward(op, inputs, left_ids, implementation, 64)
        right, last = forward(op, (*inputs[:-1], middle), 1 - left_ids, implementation, 64)
        assert error(left + right, whole) < 2e-6
        assert error(last, state) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_padding_and_other_documents_leave_no_trace(op, implementation):
    inputs, cotangents = make(op, decay=(0.0, 0.0))
    got = outputs_and_gradients(op, inputs, SEGMENTS, cotangents, implementation, 64)
    for x in (got[0], *got[2:-1]):
        assert not np.asarray(x)[SEGMENTS == 0].any()
    np.testing.assert_array_equal(got[1][2], inputs[-1][2])
    # A document is the same bit for bit whatever the one before it holds.
    before = (SEGMENTS == 1)[..., None, None]
    other = [jnp.where(before, 3 * x, x) for x in inputs[:3]]
    again = forward(op, (*other, *inputs[3:]), SEGMENTS, implementation, 64)
    later = SEGMENTS > 1
    np.testing.assert_array_equal(np.asarray(again[0])[later], np.asarray(got[0])[later])
    np.testing.assert_array_equal(again[1], got[1])


@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_defaults_and_own_scale(op):
    (q, k, *rest), cotangents = make(op, alike=0.5)
    *rest, state = rest
    expected = oracle(op, (q, k, *rest, 0 * state), None, cotangents)[0]
    k = k / np.linalg.norm(k, axis=-1, keepdims=True) if op == "kda" else k
    q = q / np.linalg.norm(q, axis=-1, keepdims=True) if op == "kda" else q
    o, last = jax.jit(lambda *x: OPS[op](*x, state_dtype=jnp.bfloat16))(q, k, *rest)
    assert error(o, expected) < 2e-6 and last.dtype == jnp.bfloat16
    half, _ = jax.jit(
        lambda *x: OPS[op](*x, scale=0.25 * (q.shape[-1] ** -0.5 if op == "kda" else 1))
    )(q, k, *rest)
    assert error(4 * half, expected) < 2e-6
