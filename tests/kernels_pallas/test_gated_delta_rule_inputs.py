"""What the gated delta rule refuses, and the words it does so with."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import backend, gated_delta_rule, gated_delta_step

SMALL = dict(
    q=np.zeros((2, 5, 2, 4), np.float32),
    k=np.zeros((2, 5, 2, 4), np.float32),
    v=np.zeros((2, 5, 4, 6), np.float32),
    g=np.zeros((2, 5, 4), np.float32),
    beta=np.zeros((2, 5, 4), np.float32),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(q=np.zeros((2, 5, 4), np.float32)),
            r"q has shape \(2, 5, 4\), expected \[B, T, H, K\]",
        ),
        (
            dict(k=np.zeros((2, 6, 2, 4), np.float32)),
            "k has shape .* expected .*B=2, T=5, H=2, K=4",
        ),
        (dict(v=np.zeros((2, 5, 4, 6), np.int32)), "v has dtype int32"),
        (dict(v=np.zeros((2, 5, 4, 6), np.float16)), "expected one dtype, got q float32"),
        (dict(g=np.zeros((2, 5, 2), np.float32)), "g has shape .* expected .*HV=4"),
        (dict(beta=np.zeros((2, 5), np.float32)), "beta has shape"),
        (
            dict(initial_state=np.zeros((2, 4, 6, 4), np.float32)),
            "initial_state has shape .*K=4, V=6",
        ),
        (dict(segment_ids=np.zeros((2, 4), np.int32)), r"segment_ids has shape \(2, 4\)"),
        (dict(segment_ids=np.zeros((2, 5), np.float32)), "segment_ids has dtype float32"),
        (dict(chunk_size=48), "chunk_size=48"),
        (dict(state_dtype=jnp.int32), "state_dtype="),
        (dict(implementation="cuda"), "'cuda' is unknown; use one of 'pallas', 'xla', 'reference'"),
        ({n: np.zeros((2, 5, 3, 4), np.float32) for n in "qk"}, "HV=4 .* H=3: .* multiple of H"),
        ({n: x[:, :0] for n, x in SMALL.items()}, "T=0 tokens"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**SMALL | change)


def test_bad_step_input_is_refused_by_name():
    inputs = {name: x[:, 0] for name, x in SMALL.items()}
    with pytest.raises(ValueError, match=r"state has shape \(2, 4, 6, 4\), expected .*K=4, V=6"):
        gated_delta_step(**inputs, state=np.zeros((2, 4, 6, 4), np.float32))
    with pytest.raises(ValueError, match=r"q has shape .*expected \[B, H, K\]"):
        gated_delta_step(**SMALL, state=np.zeros((2, 4, 4, 6), np.float32))


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
def test_splitting_t_over_devices_is_refused_with_the_reason(implementation):
    with pytest.raises((NotImplementedError, ValueError), match="axis_name"):
        gated_delta_rule(**SMALL, axis_name="data", implementation=implementation)


@pytest.mark.parametrize(
    ("sizes", "dtype", "options", "message"),
    [
        ((48, 64), "float32", {}, "K=48: the kernels take multiples of 32 from 64 to 256"),
        ((288, 64), "float32", {}, "K=288: the kernels take"),
        ((64, 72), "float32", {}, "V=72: the kernels take multiples of 16 from 64"),
        ((64, 64), "float16", {}, "q, k and v are float16: the kernels take bfloat16 or float32"),
        ((64, 64), "float32", dict(chunk_size=32), "chunk_size=32: the kernels work in chunks"),
        ((128, 64), "float32", {}, "K=128 in float32: products in three TF32 passes need more"),
    ],
)
def test_kernels_give_the_reason_and_the_default_goes_on(sizes, dtype, options, message):
    key_width, value_width = sizes
    q = np.zeros((1, 3, 1, key_width), dtype)
    v, row = np.zeros((1, 3, 1, value_width), dtype), np.zeros((1, 3, 1), np.float32)
    with backend.compile_for("gpu", interpret=True):
        with pytest.raises(ValueError, match=message):
            gated_delta_rule(q, q, v, row, row, implementation="pallas", **options)
        assert gated_delta_rule(q, q, v, row, row, **options)[0].shape == v.shape
