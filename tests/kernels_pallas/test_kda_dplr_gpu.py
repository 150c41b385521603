"""The kernels of kda and dplr_delta_rule on a GPU, against float64 recurrences run there.

Every gradient is checked over thousands of tokens, where compilers for Hopper have been seen to get
gradients of this pattern wrong without a word. `pytest -s` prints the errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import error
from vector_delta import CASES, LIMITS, NAMES, STEPS, make, oracle, outputs_and_gradients

pytestmark = pytest.mark.gpu

OPS = pytest.mark.parametrize("op", ["kda", "dplr"])
# B T H HV K V; float32 keys of 128 and more are XLA's.
SIZES = {"bfloat16": (1, 4096, 2, 4, 128, 128), "float32": (1, 4096, 1, 2, 64, 64)}
LENGTHS = [9, 1800, 1, 7, 200, 64, 100, 1900, 15]
PACKED = np.repeat([0, 1, 2, 0, 3, 4, 5, 6, 0], LENGTHS)[None].astype(np.int32)


def check(op, inputs, cotangents, ids, label):
    got = outputs_and_gradients(op, inputs, ids, cotangents, "pallas", 64)
    expected = oracle(op, inputs, ids, cotangents)
    names = ("o", "state", *("d" + name for name in NAMES[op]))
    errors = {name: error(*pair) for name, *pair in zip(names, got, expected, strict=True)}
    print(f"\n{op}, {label}: " + "  ".join(f"{name} {x:.1e}" for name, x in errors.items()))
    most, decay = LIMITS[str(got[0].dtype)]
    assert all(x <= (decay if name == "dg" else most) for name, x in errors.items()), errors
    return got


@pytest.mark.parametrize("dtype", SIZES)
@OPS
def test_matches_the_recurrence_in_float64(op, dtype):
    again = None
    for case in ("plain", "no decay, beta 1, keys alike", "weak beside strong decay"):
        inputs, cotangents = make(op, jnp.dtype(dtype), SIZES[dtype], **CASES[case])
        for ids in (np.ones_like(PACKED), PACKED):
            got = check(op, inputs, cotangents, ids, f"{dtype}, {case}, {ids.max()} documents")
        if again is None:
            again = outputs_and_gradients(op, inputs, ids, cotangents, "pallas", 64)
            for x, y in zip(got, again, strict=True):
                np.testing.assert_array_equal(x, y)  # the same bits when repeated


def test_wide_keys():
    inputs, cotangents = make("dplr", jnp.bfloat16, (1, 1024, 2, 2, 192, 192))
    check("dplr", inputs, cotangents, None, "bfloat16, K=192 V=192")


@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
@OPS
def test_step(op, state_dtype):
    inputs, cotangents = make(op, jnp.bfloat16, (8, 1, 2, 4, 128, 144))
    inputs = (*inputs[:-1], inputs[-1].astype(state_dtype))
    expected = oracle(op, inputs, None, cotangents)
    options = dict(use_qk_l2norm=True) if op == "kda" else {}
    *token, state = inputs
    token = [x[:, 0] for x in token]
    o, state = jax.jit(lambda *x: STEPS[op](*x, implementation="pallas", **options))(*token, state)
    assert error(o, expected[0][:, 0]) < 2.5e-3
    assert error(state, expected[1]) < (1e-6 if state_dtype == jnp.float32 else 2.5e-3)
