"""The fused kernels of the dynamic convolution, interpreted, against float64 NumPy.

Both ways of moving data are tested, the GPU's and the TPU's; tiles are those of the real tables.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from test_dynamic_conv import NAMES, assert_close, error, make

from kernels_pallas import backend, dynamic_conv
from kernels_pallas.dynamic_conv import blocks, gpu, tpu
from kernels_pallas.dynamic_conv import pallas as fused_module

MOVERS = {"gpu": gpu, "tpu": tpu}
LENGTH = 300  # three tiles of a GPU's, two of a TPU's, and neither divides it
ROWS = (
    [(0, 5), (1, 120), (2, 1), (3, 2), (0, 1), (4, 161), (0, 10)],
    [(1, 126), (2, 3), (3, 171)],  # borders between tiles
    [(0, 297), (1, 2), (0, 1)],  # the old tail makes up for missing rows
)
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)


@pytest.fixture(params=MOVERS)
def mover(request, monkeypatch):
    """Makes "pallas" move data as on one platform; what is traced must not outlive the test."""
    monkeypatch.setattr(fused_module, "mover", lambda: (request.param, MOVERS[request.param]))
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


def results(inputs, cotangents, segment_ids=None, has_tail=True):
    """Returns v, the tail and all gradients."""

    @jax.jit
    def run(inputs, cotangents):
        def op(u, h, w2, b2, tail):
            return dynamic_conv(
                u,
                h,
                w2,
                b2,
                tail=tail if has_tail else None,
                segment_ids=segment_ids,
                implementation="pallas",
            )

        outputs, pull = jax.vjp(op, *inputs)
        return *outputs, *pull(cotangents)

    return run(inputs, cotangents)


@pytest.mark.parametrize(
    ("width", "channels", "hidden", "is_packed", "has_tail"),
    [
        (4, 64, 16, True, True),
        (4, 192, 48, False, False),
        (2, 32, 128, False, True),
        (3, 16, 24, True, False),
        (8, 16, 32, True, True),
    ],
)
def test_matches_the_sum_in_float64(mover, width, channels, hidden, is_packed, has_tail):
    inputs, cotangents = make(batch=3, length=LENGTH, width=width, channels=channels, hidden=hidden)
    segment_ids = SEGMENTS if is_packed else None
    got = results(inputs, cotangents, segment_ids, has_tail)
    seen = inputs if has_tail else (*inputs[:4], 0 * inputs[4])
    expected = oracle.dynamic_conv(seen, segment_ids, cotangents)
    if not has_tail:
        got, expected = got[:-1], expected[:-1]
    errors = {name: error(*pair) for name, *pair in zip(NAMES, got, expected, strict=False)}
    assert max(errors.values()) < 1e-6, errors
    if is_packed:
        for x in (got[0], got[2], got[3]):
            assert not np.asarray(x)[segment_ids == 0].any()


def test_bfloat16_stays_within_its_rounding(mover):
    inputs, cotangents = make(jnp.bfloat16, batch=3, length=LENGTH, channels=64, hidden=512)
    inputs = (inputs[0], inputs[1], inputs[2] / 16, *inputs[3:])  # taps of order 1
    got = results(inputs, cotangents, SEGMENTS)
    assert_close(got, oracle.dynamic_conv(inputs, SEGMENTS, cotangents), 8e-3)
    assert {x.dtype for x in got} == {jnp.dtype(jnp.bfloat16)}


def test_pieces_equal_the_whole():
    (u, h, w2, b2, tail), _ = make(batch=2, length=LENGTH, channels=16, hidden=16)
    run = jax.jit(functools.partial(dynamic_conv, implementation="pallas"))
    step = jax.jit(functools.partial(dynamic_conv, implementation="xla"))
    whole, last = run(u, h, w2, b2, tail=tail)
    for pieces in ([1, 1, 298], [298, 2], [135, 165], [1, 128, 3, 168]):
        state, outputs, start = tail, [], 0
        for size in pieces:
            at = slice(start, start + size)
            v, state = (run if size >= 128 else step)(u[:, at], h[:, at], w2, b2, tail=state)
            outputs.append(v)
            start += size
        assert error(np.concatenate(outputs, axis=1), whole) < 1e-6
        np.testing.assert_array_equal(state, last)


def test_only_inputs_are_kept_for_the_backward_pass():
    inputs, _ = make(batch=1, length=128, channels=16, hidden=16)

    def pull(*x):
        return jax.vjp(lambda *x: dynamic_conv(*x, implementation="pallas"), *x)[1]

    kept = sum(x.size for x in jax.tree.leaves(jax.eval_shape(pull, *inputs[:4])))
    assert kept <= sum(x.size for x in inputs)


def test_rows_of_other_segments_do_not_leak_even_if_not_finite(mover):
    (u, h, w2, b2, _), _ = make(batch=1, length=LENGTH, channels=16, hidden=16)
    ids = np.repeat([[1, 2]], [150, 150], axis=1)
    run = jax.jit(functools.partial(dynamic_conv, segment_ids=ids, implementation="pallas"))
    v, _ = run(u, h, w2, b2)
    bad, _ = run(u.at[:, :150].set(jnp.inf), h, w2, b2)
    np.testing.assert_array_equal(bad[:, 150:], v[:, 150:])


def test_the_default_is_the_kernel_where_it_is_compiled():
    inputs, _ = make(batch=1, length=128, channels=16, hidden=16)

    def jaxpr(length):
        run = lambda u, h, *x: dynamic_conv(u[:, :length], h[:, :length], *x)  # noqa: E731
        return str(jax.make_jaxpr(run)(*inputs[:4]))

    assert "pallas_call" not in jaxpr(128)
    for platform in ("gpu", "tpu"):
        with backend.compile_for(platform):
            assert "pallas_call" in jaxpr(128)
            assert "pallas_call" not in jaxpr(9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(length=100), "T=100 tokens a row; the kernel takes 128 or more"),
        (dict(channels=24), "D=24 is not a multiple of 16"),
        (dict(width=9), "W=9 taps; the kernel takes up to 8"),
        (dict(dtype=jnp.float16), "u has dtype float16; the kernel takes bfloat16 and float32"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    sizes = dict(batch=1, length=128, channels=16, hidden=16)
    inputs, _ = make(**sizes | change)
    with pytest.raises(ValueError, match=message):
        dynamic_conv(*inputs[:4], implementation="pallas")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("device", MOVERS)
def test_there_are_tiles_for_every_width_that_is_searched(device, which, dtype):
    for heads in (6, 8, 12, 16):
        for value in (64, 128, 144, 192, 256, 288, 384, 512, 576):
            channels = heads * value
            args = (device, which, jnp.dtype(dtype), 8192, channels, channels // 8, 4)
            if device == "tpu" and channels % 128 and channels > 1024:
                with pytest.raises(NotImplementedError, match=f"D={channels} is not a multiple"):
                    blocks.choose(*args)
                continue
            tile = blocks.choose(*args)
            assert channels % tile.channels == 0 and tile.rows % 16 == 0
