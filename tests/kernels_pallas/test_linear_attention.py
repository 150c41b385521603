"""One suite over the implementations of linear attention, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import SEGMENTS, error
from linear_attention_inputs import (
    DECAYS,
    assert_close,
    forward,
    make,
    outputs_and_gradients,
    recurrence,
    run,
)

from kernels_pallas import linear_attention, linear_attention_step

IMPLEMENTATIONS = ["reference", "xla"]


@pytest.mark.parametrize(
    ("implementation", "decay"),
    [("reference", x) for x in DECAYS] + [("xla", "one a head"), ("xla", "one a channel")],
)
def test_matches_the_recurrence_in_float64(implementation, decay):
    inputs, cotangents = make(decay)
    got = outputs_and_gradients(inputs, None, cotangents, implementation)
    assert_close(got, recurrence(inputs, None, cotangents))


@pytest.mark.parametrize("decay", DECAYS)
def test_packed_and_padded_rows_equal_their_documents_alone(decay):
    inputs, cotangents = make(decay)
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "xla")
    assert_close(got, recurrence(inputs, SEGMENTS, cotangents))
    for x in (got[0], *got[2:6]):
        assert not np.asarray(x)[SEGMENTS == 0].any()
    np.testing.assert_array_equal(got[1][2], inputs[4][2])


@pytest.mark.parametrize("decay", ["one a head", "one a channel", "one a channel, of every size"])
def test_bfloat16_stays_within_its_rounding(decay):
    inputs, cotangents = make(decay, jnp.bfloat16)
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "xla")
    assert_close(got, recurrence(inputs, SEGMENTS, cotangents))
    assert got[0].dtype == got[2].dtype == jnp.bfloat16
    assert got[1].dtype == got[5].dtype == jnp.float32


def test_default_chunk_with_a_ragged_end_and_borders_inside():
    inputs, cotangents = make("slow channels beside fast ones", sizes=(1, 150, 1, 2, 16, 8))
    segments = np.repeat([[1, 2, 3, 4, 0]], [70, 1, 10, 60, 9], axis=1).astype(np.int32)
    got = outputs_and_gradients(inputs, segments, cotangents, "xla", chunk_size=64)
    assert_close(got, recurrence(inputs, segments, cotangents))


@pytest.mark.parametrize("decay", ["one a head", "one a channel"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_is_handed_over_at_any_split(implementation, decay):
    inputs, _ = make(decay)
    everywhere = np.ones(SEGMENTS.shape, np.int32)
    whole, state = forward(inputs, everywhere, implementation)
    for split in (1, 15, 16, 64, 149):
        left_ids = everywhere * (np.arange(everywhere.shape[1]) < split)
        left, middle = forward(inputs, left_ids, implementation)
        right, last = forward((*inputs[:4], middle), 1 - left_ids, implementation)
        assert error(left + right, whole) < 1e-6
        assert error(last, state) < 1e-6


@pytest.mark.parametrize("decay", ["one a head", "one a channel"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_equal_the_sequence(implementation, decay):
    (q, k, v, g, state), cotangents = make(decay)
    expected = recurrence((q, k, v, g, state), None, cotangents)

    @jax.jit
    def steps(state, tokens):
        def step(state, token):
            o, state = linear_attention_step(*token, state, implementation=implementation)
            return state, o

        return jax.lax.scan(step, state, tokens)

    state, o = steps(state, [jnp.moveaxis(x, 1, 0) for x in (q, k, v, g)])
    assert error(jnp.moveaxis(o, 0, 1), expected[0]) < 1e-6
    assert error(state, expected[1]) < 1e-6

    small = state.astype(jnp.bfloat16)
    kept, o = steps(small, [x[None, :, 0] for x in (q, k, 0 * v, 0 * g)])
    assert o.dtype == jnp.float32 and kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept, small)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_defaults_no_decay_own_scale(implementation):
    (q, k, v, g, state), cotangents = make("one a head, none")
    expected = recurrence((q, k, v, g, 0 * state), None, cotangents, scale=0.3)
    options = dict(scale=0.3, implementation=implementation)
    o, last = jax.jit(lambda *x: linear_attention(*x, None, state_dtype=jnp.bfloat16, **options))(
        q, k, v
    )
    assert error(o, expected[0]) < 1e-6
    assert last.dtype == jnp.bfloat16 and error(last, expected[1]) < 4e-3
    o, _ = linear_attention_step(q[:, 0], k[:, 0], v[:, 0], None, 0 * state, **options)
    assert error(o, expected[0][:, 0]) < 1e-6


@pytest.mark.parametrize("decay", ["one a head", "one a channel"])
def test_inputs_alone_are_kept_for_the_backward_pass(decay):
    inputs, _ = make(decay)

    def kept(implementation):
        rule = lambda *x: run(*x, None, implementation)  # noqa: E731
        found = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(rule, *x)[1], *inputs))
        return sum(x.size for x in found)

    assert kept("xla") <= sum(x.size for x in inputs)
    assert kept("reference") > 4 * sum(x.size for x in inputs)  # a state a token


def test_float64_keeps_its_digits():
    inputs, cotangents = make("one a channel, of every size", sizes=(1, 40, 1, 2, 4, 6))
    expected = recurrence(inputs, None, cotangents)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, cotangents))
        got = outputs_and_gradients(wide[0], None, wide[1], "xla")
    assert all(x.dtype == jnp.float64 for x in got)
    assert all(error(x, y) < 1e-12 for x, y in zip(got, expected, strict=True))
