"""What linear attention refuses, and the words it does so with."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import linear_attention, linear_attention_step

SMALL = dict(
    q=np.zeros((2, 5, 2, 4), np.float32),
    k=np.zeros((2, 5, 2, 4), np.float32),
    v=np.zeros((2, 5, 4, 6), np.float32),
    g=np.zeros((2, 5, 4), np.float32),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=np.zeros((2, 5, 4), np.float32)), r"q has shape .* expected \[B, T, H, K\]"),
        (dict(k=np.zeros((2, 6, 2, 4), np.float32)), "k has shape .*B=2, T=5, H=2, K=4"),
        (dict(v=np.zeros((2, 5, 4, 6), np.int32)), "v has dtype int32"),
        (dict(v=np.zeros((2, 5, 4, 6), np.float16)), "expected one dtype, got q float32"),
        (dict(g=np.zeros((2, 5, 2), np.float32)), "g has shape .* expected .*HV=4"),
        (dict(g=np.zeros((2, 5, 4, 6), np.float32)), "g has shape .* expected .*HV=4, K=4"),
        (dict(g=np.zeros((2, 5), np.float32)), "for one decay a head or .*K=4.* one a key channel"),
        (dict(g=np.zeros((2, 5, 4), np.int32)), "g has dtype int32"),
        (dict(initial_state=np.zeros((2, 4, 6, 4), np.float32)), "initial_state has .*K=4, V=6"),
        (dict(segment_ids=np.zeros((2, 4), np.int32)), r"segment_ids has shape \(2, 4\)"),
        (dict(segment_ids=np.zeros((2, 5), np.float32)), "segment_ids has dtype float32"),
        (dict(chunk_size=48), "chunk_size=48"),
        (dict(state_dtype=jnp.int32), "state_dtype="),
        (dict(implementation="cuda"), "'cuda' is unknown; use one of .*'reference'"),
        ({n: np.zeros((2, 5, 3, 4), np.float32) for n in "qk"}, "HV=4 .* H=3: .* multiple of H"),
        ({n: x[:, :0] for n, x in SMALL.items()}, "T=0 tokens"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        linear_attention(**SMALL | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"state has shape \(2, 4, 6, 4\), expected .*K=4, V=6"),
        (dict(q=SMALL["q"]), r"q has shape .*expected \[B, H, K\]"),
        (dict(g=SMALL["g"][:, 0, :2]), "g has shape .*HV=4"),
        (dict(state=np.zeros((2, 4, 4, 6), np.float16)), "state has dtype float16"),
        (
            {n: np.zeros((2, 3, 4), np.float32) for n in "qk"}
            | dict(state=np.zeros((2, 4, 4, 6), np.float32)),
            "HV=4 .* H=3",
        ),
    ],
)
def test_bad_step_input_is_refused_by_name(change, message):
    inputs = {name: x[:, 0] for name, x in SMALL.items()}
    with pytest.raises(ValueError, match=message):
        linear_attention_step(**inputs | dict(state=np.zeros((2, 4, 6, 4), np.float32)) | change)


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
def test_splitting_t_over_devices_is_refused_with_the_reason(implementation):
    with pytest.raises((NotImplementedError, ValueError), match="axis_name"):
        linear_attention(**SMALL, axis_name="data", implementation=implementation)
