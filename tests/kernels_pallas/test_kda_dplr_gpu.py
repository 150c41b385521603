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
# B T H HV K V; float32 keys of 128 and more are XLA's. So few heads cut T into segments.
SIZES = {
    "bfloat16": (1, 4096, 2, 4, 128, 128),
    "bfloat16, RWKV-7": (1, 4096, 2, 2, 192, 192),
    "float32": (1, 4096, 1, 2, 64, 64),
}
LENGTHS = [9, 1800, 1, 7, 200, 64, 100, 1900, 15]
PACKED = np.repeat([0, 1, 2, 0, 3, 4, 5, 6, 0], LENGTHS)[None].astype(np.int32)
# bfloat16 over thousands of tokens of which nothing is forgotten misses the limits: seen up to
# 1.5e-2 (dbeta) and 1.3e-2 (db). What is known to miss, and how far it may.
HARDEST, FAR = "no decay, beta 1, keys alike", 2e-2
MISSES = {"kda": ("o", "state", "dq", "dk", "dv", "dg", "dbeta"), "dplr": ("da", "db")}


def check(op, inputs, cotangents, ids, label, misses=()):
    """Compares with float64 and returns the names of those known misses that are over the limit."""
    got = outputs_and_gradients(op, inputs, ids, cotangents, "pallas", 64)
    again = outputs_and_gradients(op, inputs, ids, cotangents, "pallas", 64)
    for x, y in zip(got, again, strict=True):
        np.testing.assert_array_equal(x, y)  # the same bits when repeated
    expected = oracle(op, inputs, ids, cotangents)
    names = ("o", "state", *("d" + name for name in NAMES[op]))
    errors = {name: error(*pair) for name, *pair in zip(names, got, expected, strict=True)}
    print(f"\n{op}, {label}: " + "  ".join(f"{name} {x:.1e}" for name, x in errors.items()))
    most, decay = LIMITS[str(got[0].dtype)]
    over = {name for name, x in errors.items() if x > (decay if name == "dg" else most)}
    assert over <= set(misses) and all(errors[name] <= FAR for name in over), errors
    return over


@pytest.mark.parametrize("case", ["plain", HARDEST, "weak beside strong decay"])
@pytest.mark.parametrize("size", SIZES)
@OPS
def test_matches_the_recurrence_in_float64(op, size, case):
    dtype = size.split(",")[0]
    inputs, cotangents = make(op, jnp.dtype(dtype), SIZES[size], **CASES[case])
    misses = MISSES[op] if (dtype, case) == ("bfloat16", HARDEST) else ()
    missed = set()
    for ids in (np.ones_like(PACKED), PACKED):
        label = f"{size}, {case}, {ids.max()} documents"
        missed |= check(op, inputs, cotangents, ids, label, misses)
    if missed:
        pytest.xfail(f"known misses of the limits: {', '.join(sorted(missed))}")


@pytest.mark.parametrize("decay", [(0.0, 0.6), (0.5, 2.1), (1.0, 6.0)])
@OPS
def test_blocks_of_every_size_about_their_middle(op, decay):
    """Decays within the bound of a whole chunk, of half of it, and of fewer rows."""
    inputs, cotangents = make(op, jnp.bfloat16, (1, 1024, 2, 2, 128, 128))
    place = NAMES[op].index("g")
    g = jax.random.uniform(jax.random.key(0), inputs[place].shape, minval=decay[0], maxval=decay[1])
    inputs = (*inputs[:place], -g, *inputs[place + 1 :])
    check(op, inputs, cotangents, None, f"-g in {decay}")


@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [(8, 1, 2, 4, 128, 144), (4, 1, 18, 18, 128, 128)])
@OPS
def test_step(op, sizes, state_dtype):
    check_step(op, sizes, state_dtype)


@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
def test_step_of_rwkv7(state_dtype):
    check_step("dplr", (4, 1, 8, 8, 192, 192), state_dtype)


def check_step(op, sizes, state_dtype):
    inputs, cotangents = make(op, jnp.bfloat16, sizes)
    inputs = (*inputs[:-1], inputs[-1].astype(state_dtype))
    expected = oracle(op, inputs, None, cotangents)
    options = dict(use_qk_l2norm=True) if op == "kda" else {}
    *token, state = inputs
    token = [x[:, 0] for x in token]
    o, state = jax.jit(lambda *x: STEPS[op](*x, implementation="pallas", **options))(*token, state)
    assert error(o, expected[0][:, 0]) < 2.5e-3
    assert error(state, expected[1]) < (1e-6 if state_dtype == jnp.float32 else 2.5e-3)
