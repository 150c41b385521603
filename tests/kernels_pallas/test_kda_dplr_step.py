"""One decoding step of kda and dplr_delta_rule in the kernel: against float64, and in place."""

import functools

import compile_cases_kda_dplr as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import error
from jax.sharding import AbstractDevice, AbstractMesh
from vector_delta import STEPS, make, oracle

from kernels_pallas import backend

OPS = pytest.mark.parametrize("op", ["kda", "dplr"])
# Rounding a result once: half a unit in the last of 8 bits, 1.7e-3 on average. In float32 the sums.
TOLERANCE = {"float32": 1e-6, "bfloat16": 2.5e-3}


def token_of(op, sizes, dtype=jnp.float32, state_dtype=jnp.float32):
    inputs, cotangents = make(op, dtype, (sizes[0], 1, *sizes[1:]))
    inputs = (*inputs[:-1], inputs[-1].astype(state_dtype))
    return inputs, oracle(op, inputs, None, cotangents)[:2]


@functools.partial(jax.jit, static_argnames=("op", "platform"))
def step(op, inputs, platform):
    *token, state = inputs
    options = dict(use_qk_l2norm=True) if op == "kda" else {}
    with backend.compile_for(platform, interpret=True):
        return STEPS[op](*(x[:, 0] for x in token), state, implementation="pallas", **options)


@pytest.mark.parametrize(
    ("sizes", "dtype", "state_dtype"),
    [
        ((2, 2, 6, 96, 144), jnp.float32, jnp.float32),  # the last block of V is part full
        ((2, 2, 2, 64, 64), jnp.bfloat16, jnp.float32),
        ((1, 1, 2, 192, 192), jnp.bfloat16, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@OPS
def test_matches_the_recurrence_in_float64(op, platform, sizes, dtype, state_dtype):
    inputs, (expected, expected_state) = token_of(op, sizes, dtype, state_dtype)
    o, state = step(op, inputs, platform)
    assert o.dtype == dtype and state.dtype == state_dtype
    assert error(o, expected[:, 0]) < TOLERANCE[o.dtype.name]
    assert error(state, expected_state) < TOLERANCE[state.dtype.name]


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@OPS
def test_rows_that_write_nothing_keep_their_state(op, platform):
    inputs, _ = token_of(op, (2, 1, 2, 64, 64), state_dtype=jnp.bfloat16)
    writes = (3, 4) if op == "kda" else (1, 4, 5)  # g and beta; k, b and g
    idle = [x.at[1].set(0) if i in writes else x for i, x in enumerate(inputs)]
    _, state = step(op, tuple(idle), platform)
    np.testing.assert_array_equal(state[1], inputs[-1][1])
    assert (np.asarray(state[0]) != np.asarray(inputs[-1][0])).any()


@OPS
def test_state_is_written_in_place(op):
    name, function, shapes = next(x for x in cases.CASES if x[0].startswith(f"{op} step"))
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), backend.compile_for("gpu"):
        donated = jax.jit(function, donate_argnums=len(shapes) - 1).trace(*shapes)
        text = donated.lower(lowering_platforms=("cuda",)).as_text()
    assert "output_operand_alias" in text and "tf.aliasing_output = 1" in text, name


@OPS
def test_widths_that_the_kernel_does_not_take_are_refused_with_the_reason(op):
    inputs, _ = token_of(op, (1, 1, 1, 40, 64))
    with pytest.raises(ValueError, match="K=40: the kernel takes multiples of 32"):
        step(op, inputs, "gpu")
