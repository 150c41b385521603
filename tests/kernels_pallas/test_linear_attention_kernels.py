"""Linear attention's kernels: against float64 NumPy, widths, layouts, and T cut or split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import SEGMENTS, error
from jax.sharding import AxisType, PartitionSpec
from linear_attention_inputs import (
    DECAYS,
    SIZES,
    assert_close,
    forward,
    make,
    outputs_and_gradients,
    recurrence,
    run,
)

from kernels_pallas import backend, linear_attention
from kernels_pallas.linear_attention.blocks import Blocks
from kernels_pallas.linear_attention.pallas import linear_attention_pallas


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_rows_match_the_recurrence_in_float64(decay, dtype):
    inputs, cotangents = make(decay, dtype, SIZES["pallas"])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "pallas")
    assert_close(got, recurrence(inputs, SEGMENTS, cotangents))
    for x in (got[0], *got[2:6]):
        assert not np.asarray(x)[SEGMENTS == 0].any()
    np.testing.assert_array_equal(got[1][2], inputs[4][2])


def test_layout_of_a_tpu():
    inputs, cotangents = make("slow channels beside fast ones", sizes=SIZES["pallas"])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "pallas for a TPU")
    assert_close(got, recurrence(inputs, SEGMENTS, cotangents))


@pytest.mark.parametrize(
    ("widths", "decay"),
    [
        ((96, 144), "one a head"),
        ((192, 64), "one a channel, of every size"),
    ],
)
def test_widths(widths, decay):
    inputs, cotangents = make(decay, sizes=(1, 70, 1, 1, *widths))
    got = outputs_and_gradients(inputs, None, cotangents, "pallas")
    assert_close(got, recurrence(inputs, None, cotangents))


def test_state_is_handed_over_at_any_split():
    inputs, _ = make("one a channel", sizes=SIZES["pallas"])
    everywhere = np.ones(SEGMENTS.shape, np.int32)
    whole, state = forward(inputs, everywhere, "pallas")
    for split in (1, 63, 64, 149):
        left_ids = everywhere * (np.arange(everywhere.shape[1]) < split)
        left, middle = forward(inputs, left_ids, "pallas")
        right, last = forward((*inputs[:4], middle), 1 - left_ids, "pallas")
        assert error(left + right, whole) < 1e-6
        assert error(last, state) < 1e-6


def test_segments_that_walk_side_by_side_equal_one_walk():
    sizes = (1, 4100, 1, 1, 64, 64)  # 2 segments of 2112 tokens
    inputs, cotangents = make("slow channels beside fast ones", sizes=sizes)
    # A document over the cut, and one that ends just before the end.
    ids = np.repeat([[1, 2, 3, 0]], [1000, 2000, 1090, 10], axis=1).astype(np.int32)
    traced = outputs_and_gradients.trace(inputs, ids, cotangents, "pallas")
    assert "linear_attention_walk_final" in str(traced.jaxpr)
    got = outputs_and_gradients(inputs, ids, cotangents, "pallas")
    assert_close(got, recurrence(inputs, ids, cotangents))


def test_t_split_over_devices_equals_the_whole():
    inputs, cotangents = make("one a head", sizes=(1, 4 * 70, 1, 2, 64, 64))  # 70: not whole chunks
    lengths = [3, 97, 30, 120, 30]  # leading padding, and segments over several devices
    ids = np.repeat([[0, 1, 2, 3, 0]], lengths, axis=1).astype(np.int32)
    mesh = jax.make_mesh((4,), ("t",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    spec, everywhere = PartitionSpec(None, "t"), PartitionSpec()

    def part(q, k, v, g, state, ids):
        return linear_attention(
            *(q, k, v, g),
            initial_state=state,
            segment_ids=ids,
            axis_name="t",
            implementation="pallas",
        )

    split = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(spec, spec, spec, spec, everywhere, spec),
        out_specs=(spec, everywhere),
        check_vma=False,
    )

    @jax.jit
    def all_of(inputs, cotangents):
        outputs, pull = jax.vjp(lambda *x: split(*x, ids), *inputs)
        return *outputs, *pull(cotangents)

    assert_close(all_of(inputs, cotangents), recurrence(inputs, ids, cotangents))


def test_same_bits_wherever_a_row_stands_in_the_batch():
    inputs, cotangents = make("one a channel", "bfloat16", SIZES["pallas"])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "pallas")
    rolled = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), (inputs, SEGMENTS, cotangents))
    again = outputs_and_gradients(*rolled, "pallas")
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(jnp.roll(y, -1, axis=0)))


@pytest.mark.parametrize("decay", ["one a head", "one a channel"])
def test_kernels_keep_their_inputs_alone(decay):
    inputs, _ = make(decay, "bfloat16", SIZES["pallas"])
    rule = lambda *x: run(*x, None, "pallas")  # noqa: E731
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(rule, *x)[1], *inputs))
    assert sum(x.size * x.dtype.itemsize for x in kept) <= sum(x.nbytes for x in inputs)


@pytest.mark.parametrize(
    ("sizes", "dtype", "options", "message"),
    [
        ((48, 64), "float32", {}, "K=48: the kernels take multiples of 32 from 64 to 256"),
        ((64, 72), "float32", {}, "V=72: the kernels take multiples of 16 from 64"),
        ((64, 64), "float16", {}, "q, k and v are float16: the kernels take bfloat16 or float32"),
        ((64, 64), "float32", dict(chunk_size=32), "chunk_size=32: the kernels work in chunks"),
        ((128, 64), "float32", {}, "K=128 in float32: products in three TF32 passes need more"),
    ],
)
def test_kernels_give_the_reason_and_the_default_goes_on(sizes, dtype, options, message):
    key_width, value_width = sizes
    q, v = np.zeros((1, 3, 1, key_width), dtype), np.zeros((1, 3, 1, value_width), dtype)
    with backend.compile_for("gpu", interpret=True):
        with pytest.raises(ValueError, match=message):
            linear_attention(q, q, v, None, implementation="pallas", **options)
        assert linear_attention(q, q, v, None, **options)[0].shape == v.shape


def test_blocks_may_be_chosen():
    inputs, _ = make("one a channel", sizes=(1, 130, 1, 1, 64, 128))
    q, k, v, g, state = inputs
    call = functools.partial(
        linear_attention_pallas,
        scale=None,
        initial_state=state,
        segment_ids=None,
        state_dtype=jnp.dtype("float32"),
        chunk_size=64,
        axis_name=None,
    )
    want = jax.jit(call)(q, k, v, g)
    got = jax.jit(functools.partial(call, blocks=Blocks(v_block=128, channels=64)))(q, k, v, g)
    assert all(error(x, y) < 1e-6 for x, y in zip(got, want, strict=True))
