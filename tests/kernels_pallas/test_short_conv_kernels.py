"""The short convolution's kernels, interpreted in both devices' layouts, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from test_short_conv import NAMES, assert_close, error, make

from kernels_pallas import backend, short_conv
from kernels_pallas.short_conv import blocks

DEVICES = ["gpu", "tpu"]
LENGTH = 70  # three strips of a GPU's and two tiles of a TPU's, and neither divides it
ROWS = (
    [(0, 5), (1, 25), (2, 1), (3, 2), (0, 1), (4, 29), (0, 7)],
    [(1, 30), (2, 3), (3, 32), (4, 5)],  # borders between tiles
    [(0, 67), (1, 2), (0, 1)],  # the old tail makes up for missing rows
    [(0, 70)],
)
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)


@pytest.fixture(params=DEVICES)
def device(request):
    """Runs the kernels of one device in the interpreter."""
    with backend.compile_for(request.param, interpret=True):
        yield request.param


@functools.partial(jax.jit, static_argnames=("activation", "has_bias", "has_tail"))
def results(inputs, cotangents, segment_ids, activation="silu", has_bias=True, has_tail=True):
    """Returns y, the tail and all gradients."""

    def op(u, w, b, tail):
        return short_conv(
            u,
            w,
            b if has_bias else None,
            activation=activation,
            tail=tail if has_tail else None,
            segment_ids=segment_ids,
            implementation="pallas",
        )

    outputs, pull = jax.vjp(op, *inputs)
    return *outputs, *pull(cotangents)


@pytest.mark.parametrize(
    ("width", "channels", "activation", "is_packed", "has_bias", "has_tail"),
    [
        (4, 144, "silu", True, True, True),  # two strips of a GPU's, the second not full
        (4, 256, "silu", False, False, False),
        (2, 16, None, False, True, True),
        (8, 80, "silu", True, False, False),
    ],
)
def test_matches_the_sum_in_float64(
    device, width, channels, activation, is_packed, has_bias, has_tail
):
    inputs, cotangents = make(batch=4, length=LENGTH, width=width, channels=channels)
    u, w, b, tail = inputs
    segment_ids = SEGMENTS if is_packed else None
    inputs = (u, w, b if has_bias else 0 * b, tail if has_tail else 0 * tail)
    got = results(inputs, cotangents, segment_ids, activation, has_bias, has_tail)
    expected = oracle.short_conv(inputs, segment_ids, cotangents, activation)
    taken = [name for name in NAMES if (has_bias or name != "db") and (has_tail or name != "dtail")]
    pairs = zip(NAMES, got, expected, strict=True)
    errors = {name: error(x, y) for name, x, y in pairs if name in taken}
    assert max(errors.values()) < 1e-6, errors
    if is_packed:
        for x in (got[0], got[2]):
            assert not np.asarray(x)[segment_ids == 0].any()


def test_bfloat16_stays_within_its_rounding(device):
    inputs, cotangents = make(jnp.bfloat16, batch=4, length=LENGTH, channels=32)
    got = results(inputs, cotangents, SEGMENTS)
    assert_close(got, oracle.short_conv(inputs, SEGMENTS, cotangents, "silu"), 8e-3)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}


def test_packed_rows_equal_their_documents_alone(device):
    (u, w, b, _), _ = make(batch=2, length=LENGTH, channels=16)
    run = jax.jit(functools.partial(short_conv, implementation="pallas"))
    packed, _ = run(u, w, b, segment_ids=SEGMENTS[:2])
    for row, start in ((0, 34), (1, 33)):
        alone, _ = run(u[row : row + 1, start : start + 29], w, b)
        np.testing.assert_array_equal(packed[row, start : start + 29], alone[0])


def test_pieces_equal_the_whole():
    (u, w, b, tail), _ = make(batch=2, length=LENGTH, channels=16)
    run = jax.jit(functools.partial(short_conv, implementation="pallas"))
    step = jax.jit(functools.partial(short_conv, implementation="xla"))
    whole, last = run(u, w, b, tail=tail)
    for pieces in ([1, 1, 68], [35, 35]):
        state, outputs, start = tail, [], 0
        for size in pieces:
            call = run if size >= blocks.FEWEST_ROWS else step
            y, state = call(u[:, start : start + size], w, b, tail=state)
            outputs.append(y)
            start += size
        assert error(np.concatenate(outputs, axis=1), whole) < 1e-6
        np.testing.assert_array_equal(state, last)


def test_rows_of_other_segments_do_not_leak_even_if_not_finite(device):
    (u, w, b, _), (dy, _) = make(batch=1, length=LENGTH, channels=16)
    ids = np.repeat([[1, 0, 2]], [30, 10, 30], axis=1)

    @jax.jit
    def run(u, dy):
        y, pull = jax.vjp(
            lambda u: short_conv(u, w, b, segment_ids=ids, implementation="pallas")[0], u
        )
        return y, *pull(dy)

    good = run(u, dy)
    bad = run(u.at[:, :40].set(jnp.inf), dy.at[:, :40].set(jnp.nan))
    for x, y in zip(good, bad, strict=True):
        np.testing.assert_array_equal(x[:, 40:], y[:, 40:])


def test_only_inputs_are_kept_for_the_backward_pass():
    inputs, _ = make(batch=1, length=64, channels=16)

    def pull(*x):
        return jax.vjp(functools.partial(short_conv, implementation="pallas"), *x)[1]

    kept = sum(x.size for x in jax.tree.leaves(jax.eval_shape(pull, *inputs[:3])))
    assert kept <= sum(x.size for x in inputs)


def test_the_default_is_the_kernel_where_there_is_one():
    (u, w, *_), _ = make(batch=1, length=64, channels=16)

    def is_kernel(platform, length):
        with backend.compile_for(platform):
            return "pallas_call" in str(jax.make_jaxpr(short_conv)(u[:, :length], w))

    assert is_kernel("tpu", 64)
    assert is_kernel("gpu", 64)
    assert not is_kernel("tpu", 9) and not is_kernel("cpu", 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=15), "T=15 tokens a row; the kernel takes 16 or more"),
        (dict(channels=24), "D=24 is not a multiple of 16"),
        (dict(width=9), "W=9 taps; the kernel takes up to 8"),
        (dict(dtype=jnp.float16), "u has dtype float16; the kernel takes bfloat16 and float32"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    (u, w, *_), _ = make(**dict(batch=1, length=64, channels=16) | change)
    with pytest.raises(ValueError, match=message):
        short_conv(u, w, implementation="pallas")


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_tiles_fit_the_shape(which):
    for width in range(2, blocks.MAX_TAPS + 1):
        for channels in (16, 1040, 3072, 4096):
            for length in (16, 1000, 262144):
                shape = (1, length, channels)
                tile = blocks.choose("gpu", which, shape, "bfloat16", width)
                assert tile.at_once >= width - 1 and tile.rows % tile.at_once == 0
                tile = blocks.choose("tpu", which, shape, "bfloat16", width)
                assert channels % tile.channels == 0 and tile.rows % 16 == 0
                assert tile.channels % 128 == 0 or tile.channels == channels
    with pytest.raises(NotImplementedError, match="u has 2147483648 values"):
        blocks.choose("gpu", which, (1, 2**19, 4096), "bfloat16", 4)
    with pytest.raises(NotImplementedError, match="D=4112 is not a multiple of 128"):
        blocks.choose("tpu", which, (1, 1000, 4112), "bfloat16", 4)
