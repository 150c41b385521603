"""One suite over the implementations of the dynamic convolution, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest

from kernels_pallas import dynamic_conv

IMPLEMENTATIONS = ["reference", "xla"]
NAMES = ("v", "tail", "du", "dh", "dw2", "db2", "dtail")
ROWS = (
    [(0, 2), (1, 5), (2, 1), (3, 2), (0, 1), (4, 6), (0, 3)],
    [(1, 12), (2, 2), (0, 6)],  # fewer rows than the tail holds
    [(0, 18), (1, 2)],  # the old tail makes up for them
    [(0, 20)],
    [(1, 20)],
)
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)


def make(dtype=jnp.float32, batch=5, length=20, width=4, channels=6, hidden=3):
    rng = np.random.default_rng(0)
    shapes = (
        (batch, length, channels),
        (batch, length, hidden),
        (hidden, width, channels),
        (width, channels),
        (batch, width - 1, channels),
        (batch, length, channels),
        (batch, width - 1, channels),
    )
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return tuple(arrays[:5]), tuple(arrays[5:])


@functools.partial(jax.jit, static_argnames=("implementation",))
def outputs_and_gradients(inputs, segment_ids, cotangents, implementation):
    def run(u, h, w2, b2, tail):
        return dynamic_conv(
            u, h, w2, b2, tail=tail, segment_ids=segment_ids, implementation=implementation
        )

    outputs, pull = jax.vjp(run, *inputs)
    return *outputs, *pull(cotangents)


def error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_close(got, expected, limit):
    errors = {name: error(*pair) for name, *pair in zip(NAMES, got, expected, strict=True)}
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_the_sum_in_float64(implementation, segment_ids):
    inputs, cotangents = make()
    got = outputs_and_gradients(inputs, segment_ids, cotangents, implementation)
    assert_close(got, oracle.dynamic_conv(inputs, segment_ids, cotangents), 1e-6)
    if segment_ids is not None:
        for x in (got[0], got[2], got[3]):
            assert not np.asarray(x)[segment_ids == 0].any()
        np.testing.assert_array_equal(got[1][3], inputs[4][3])


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_tail_is_a_tail_of_zeros(implementation, segment_ids):
    (*inputs, tail), _ = make()
    run = jax.jit(functools.partial(dynamic_conv, implementation=implementation))
    v, new = run(*inputs, segment_ids=segment_ids)
    zeros = (jnp.zeros_like(v), jnp.zeros_like(tail))
    expected = oracle.dynamic_conv((*inputs, 0 * tail), segment_ids, zeros)
    assert error(v, expected[0]) < 1e-6
    np.testing.assert_array_equal(new, np.float32(expected[1]))


def test_bfloat16_stays_within_its_rounding():
    inputs, cotangents = make(jnp.bfloat16)
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "xla")
    assert_close(got, oracle.dynamic_conv(inputs, SEGMENTS, cotangents), 8e-3)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_single_tokens_and_chunks_equal_the_whole(implementation):
    (u, h, w2, b2, tail), _ = make()
    run = jax.jit(functools.partial(dynamic_conv, implementation=implementation))
    whole, last = run(u, h, w2, b2, tail=tail)
    for pieces in ([1] * 20, [2, 18], [18, 2]):
        state, outputs, start = tail, [], 0
        for size in pieces:
            at = slice(start, start + size)
            v, state = run(u[:, at], h[:, at], w2, b2, tail=state)
            outputs.append(v)
            start += size
        assert error(np.concatenate(outputs, axis=1), whole) < 1e-6
        np.testing.assert_array_equal(state, last)


def test_single_tokens_of_finished_rows_keep_their_tail():
    (u, h, w2, b2, tail), _ = make()
    ids = np.array([[1], [0], [1], [0], [1]], np.int32)
    _, new = dynamic_conv(u[:, :1], h[:, :1], w2, b2, tail=tail, segment_ids=ids)
    shifted = np.concatenate([tail[:, 1:], u[:, :1]], axis=1)
    np.testing.assert_array_equal(new, np.where(ids[..., None] != 0, shifted, tail))


def test_taps_are_not_kept_for_the_backward_pass():
    inputs, _ = make()
    taps = 5 * 20 * 4 * 6

    def kept(implementation):
        def pull(*x):
            run = functools.partial(dynamic_conv, implementation=implementation)
            return jax.vjp(lambda *x: run(*x[:4], tail=x[4]), *x)[1]

        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(pull, *inputs)))

    assert kept("xla") <= sum(x.size for x in inputs)
    assert kept("reference") > taps  # which keeps them: the measure sees it


SMALL = dict(
    u=np.zeros((2, 5, 6), np.float32),
    h=np.zeros((2, 5, 3), np.float32),
    w2=np.zeros((3, 4, 6), np.float32),
    b2=np.zeros((4, 6), np.float32),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(u=np.zeros((2, 5), np.float32)), r"u has shape \(2, 5\), expected \[B, T, D\]"),
        (dict(h=np.zeros((2, 5, 3), np.float16)), "expected one dtype, got u float32, h float16"),
        (dict(w2=np.zeros((4, 3, 6), np.float32)), "w2 has shape .* expected .*R=3, W, D=6"),
        (dict(b2=np.zeros((6, 4), np.float32)), "b2 has shape .* expected .*W=4, D=6"),
        (dict(tail=np.zeros((2, 4, 6), np.float32)), "tail has shape .* expected .*W-1=3"),
        (dict(segment_ids=np.zeros((5, 2), np.int32)), "segment_ids has shape"),
        (dict(implementation="triton"), "'triton' is unknown"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dynamic_conv(**SMALL | change)
