"""One suite over the implementations of the short convolution, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from test_dynamic_conv import SEGMENTS, error

from kernels_pallas import short_conv

IMPLEMENTATIONS = ["reference", "xla"]
NAMES = ("y", "tail", "du", "dw", "db", "dtail")


def make(dtype=jnp.float32, batch=5, length=20, width=4, channels=6):
    rng = np.random.default_rng(0)
    rows, tail = (batch, length, channels), (batch, width - 1, channels)
    shapes = (rows, (width, channels), (channels,), tail, rows, tail)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return tuple(arrays[:4]), tuple(arrays[4:])


@functools.partial(jax.jit, static_argnames=("activation", "implementation"))
def outputs_and_gradients(inputs, segment_ids, cotangents, activation, implementation):
    def run(u, w, b, tail):
        return short_conv(
            u,
            w,
            b,
            activation=activation,
            tail=tail,
            segment_ids=segment_ids,
            implementation=implementation,
        )

    outputs, pull = jax.vjp(run, *inputs)
    return *outputs, *pull(cotangents)


def assert_close(got, expected, limit):
    errors = {name: error(*pair) for name, *pair in zip(NAMES, got, expected, strict=True)}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_the_sum_in_float64(implementation, segment_ids, activation):
    inputs, cotangents = make()
    got = outputs_and_gradients(inputs, segment_ids, cotangents, activation, implementation)
    assert_close(got, oracle.short_conv(inputs, segment_ids, cotangents, activation), 1e-6)
    if segment_ids is not None:
        for x in (got[0], got[2]):
            assert not np.asarray(x)[segment_ids == 0].any()
        np.testing.assert_array_equal(got[1][3], inputs[3][3])


@pytest.mark.parametrize("width", [2, 7])
def test_other_numbers_of_taps(width):
    inputs, cotangents = make(width=width)
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "silu", "xla")
    assert_close(got, oracle.short_conv(inputs, SEGMENTS, cotangents, "silu"), 1e-6)


def test_bfloat16_stays_within_its_rounding():
    inputs, cotangents = make(jnp.bfloat16)
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "silu", "xla")
    assert_close(got, oracle.short_conv(inputs, SEGMENTS, cotangents, "silu"), 8e-3)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_bias_and_no_tail_are_zeros(implementation):
    (u, w, b, tail), cotangents = make()
    y, new = short_conv(u, w, segment_ids=SEGMENTS, implementation=implementation)
    expected = oracle.short_conv((u, w, 0 * b, 0 * tail), SEGMENTS, cotangents, "silu")
    assert error(y, expected[0]) < 1e-6
    np.testing.assert_array_equal(new, np.float32(expected[1]))


def test_single_tokens_and_chunks_equal_the_whole():
    (u, w, b, tail), _ = make()
    run = jax.jit(short_conv)
    whole, last = run(u, w, b, tail=tail)
    for pieces in ([1] * 20, [2, 18], [18, 2]):
        state, outputs, start = tail, [], 0
        for size in pieces:
            y, state = run(u[:, start : start + size], w, b, tail=state)
            outputs.append(y)
            start += size
        assert error(np.concatenate(outputs, axis=1), whole) < 1e-6
        np.testing.assert_array_equal(state, last)


def test_only_inputs_are_kept_for_the_backward_pass():
    inputs, _ = make()

    def kept(implementation):
        def pull(*x):
            run = functools.partial(short_conv, implementation=implementation)
            return jax.vjp(lambda u, w, b, tail: run(u, w, b, tail=tail), *x)[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(pull, *inputs)))

    assert kept("xla") <= sum(x.size for x in inputs)
    assert kept("reference") > 4 * inputs[0].size  # the windows: the measure sees them


SMALL = dict(u=np.zeros((2, 5, 6), np.float32), w=np.zeros((4, 6), np.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=np.zeros((2, 5), np.float32)), r"u has shape \(2, 5\), expected \[B, T, D\]"),
        (dict(w=np.zeros((6, 4), np.float32)), r"w has shape \(6, 4\), expected \[W, D=6\]"),
        (dict(w=np.zeros((1, 6), np.float32)), "W=1 taps, expected T >= 1 and W >= 2"),
        (dict(b=np.zeros(4, np.float32)), r"b has shape \(4,\), expected \[D=6\]"),
        (dict(tail=np.zeros((2, 4, 6), np.float32)), "tail has shape .* expected .*W-1=3"),
        (dict(tail=np.zeros((2, 3, 6), np.int32)), "tail has dtype int32"),
        (dict(segment_ids=np.zeros((5, 2), np.int32)), "segment_ids has shape"),
        (dict(activation="relu"), "activation='relu' is unknown; use 'silu' or None"),
        (dict(implementation="cuda"), "'cuda' is unknown; use one of 'pallas', 'xla', 'reference'"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        short_conv(**SMALL | change)
