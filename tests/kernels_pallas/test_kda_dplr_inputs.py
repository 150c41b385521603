"""What kda and dplr_delta_rule refuse, and the words they do so with."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import dplr_delta_rule, dplr_delta_rule_step, kda, kda_step


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


KDA = dict(
    q=zeros(2, 5, 2, 4),
    k=zeros(2, 5, 2, 4),
    v=zeros(2, 5, 4, 6),
    g=zeros(2, 5, 4, 4),
    beta=zeros(2, 5, 4),
)
DPLR = {name: zeros(2, 5, 4, 4) for name in "qkabg"} | dict(v=zeros(2, 5, 4, 6))
BOTH = [
    (dict(q=zeros(2, 5, 4)), r"q has shape .* expected \[B, T, H, K\]"),
    (dict(k=zeros(2, 6, 2, 4)), "k has shape .*B=2, T=5"),
    (dict(v=zeros(2, 5, 4, 6, dtype=np.int32)), "v has dtype int32"),
    (dict(v=zeros(2, 5, 4, 6, dtype=np.float16)), "expected one dtype, got q float32"),
    (dict(g=zeros(2, 5, 4)), "g has shape .* expected .*K=4"),
    (dict(g=zeros(2, 5, 4, 4, dtype=np.int32)), "g has dtype int32"),
    (dict(initial_state=zeros(2, 4, 6, 4)), "initial_state has .*K=4, V=6"),
    (dict(segment_ids=zeros(2, 4, dtype=np.int32)), r"segment_ids has shape \(2, 4\)"),
    (dict(segment_ids=zeros(2, 5)), "segment_ids has dtype float32"),
    (dict(chunk_size=48), "chunk_size=48"),
    (dict(state_dtype=jnp.int32), "state_dtype="),
    (dict(implementation="cuda"), "'cuda' is unknown; use one of .*'reference'"),
    (dict(implementation="reference", axis_name="data"), "axis_name"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BOTH,
        (dict(beta=zeros(2, 5, 2)), "beta has shape .*HV=4"),
        (dict(g=zeros(2, 5, 2, 4)), "g has shape .*HV=4"),
        ({n: zeros(2, 5, 3, 4) for n in "qk"}, "HV=4 .* H=3: .* multiple of H"),
        ({n: x[:, :0] for n, x in KDA.items()}, "T=0 tokens"),
    ],
)
def test_kda_refuses_bad_input_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        kda(**KDA | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *BOTH,
        (dict(a=zeros(2, 5, 4, 6)), "a has shape .*K=4"),
        (dict(b=zeros(2, 5, 2, 4)), "b has shape .*H=4"),
        (dict(b=zeros(2, 5, 4, 4, dtype=np.float16)), "expected one dtype, .*b float16"),
        ({n: x[:, :0] for n, x in DPLR.items()}, "T=0 tokens"),
    ],
)
def test_dplr_refuses_bad_input_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        dplr_delta_rule(**DPLR | change)


@pytest.mark.parametrize(("step", "inputs"), [(kda_step, KDA), (dplr_delta_rule_step, DPLR)])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(state=zeros(2, 4, 6, 4)), r"state has shape \(2, 4, 6, 4\), expected .*K=4, V=6"),
        (dict(q=KDA["q"]), r"q has shape .*expected \[B, H, K\]"),
        (dict(g=zeros(2, 4, 3)), "g has shape .*K=4"),
        (dict(state=zeros(2, 4, 4, 6, dtype=np.float16)), "state has dtype float16"),
        (dict(v=zeros(2, 4, 6, dtype=np.float16)), "expected one dtype"),
    ],
)
def test_bad_step_input_is_refused_by_name(step, inputs, change, message):
    inputs = {name: x[:, 0] for name, x in inputs.items()} | dict(state=zeros(2, 4, 4, 6))
    with pytest.raises(ValueError, match=message):
        step(**inputs | change)
