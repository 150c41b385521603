"""The decoding step's kernel on a GPU: many steps against the recurrence in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_recurrence import compile_recurrence, errors_per_head
from gated_delta_corners import CORNERS, Case, make

from kernels_pallas import gated_delta_step

pytestmark = pytest.mark.gpu

LIMITS = {"float32": 3e-6, "bfloat16": 8e-3}
LENGTH = 200
STEP = functools.partial(gated_delta_step, use_qk_l2norm=True, implementation="pallas")


@jax.jit
def steps(tokens, state):
    def step(state, token):
        o, state = STEP(*token, state)
        return state, o

    state, o = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in tokens])
    return jnp.moveaxis(o, 0, 1), state


@pytest.mark.parametrize(
    ("dtype", "widths"), [("float32", (96, 256)), ("bfloat16", (96, 256)), ("bfloat16", (256, 576))]
)
def test_steps_follow_the_recurrence(dtype, widths):
    """States stay float32, whatever the dtype of what is read and written."""
    sizes = (2, LENGTH, 12, 12, *widths)
    (*tokens, state), cotangents, _ = make(Case(dtype, sizes))
    o, last = steps(tokens, state)
    again = steps(tokens, state)
    assert bool(jnp.array_equal(o, again[0])) and bool(jnp.array_equal(last, again[1]))
    exact = compile_recurrence(sizes)((*tokens, state), cotangents)
    errors = [x.max(axis=0) for x in errors_per_head((o, last), exact[:2])]
    print(f"\n{dtype} K={widths[0]} V={widths[1]}: o and state")
    for label, *x in zip([*CORNERS, *range(6, 12)], *errors, strict=True):
        print(f"{label!s:20} {x[0]:.1e} {x[1]:.1e}")
    assert errors[0].max() <= LIMITS[dtype]
    assert errors[1].max() <= LIMITS["float32"]


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_thousand_random_states(state_dtype):
    """One step of 1,536 heads: finite at every scale, exact but for rounding, padding kept."""
    sizes = (128, 1, 12, 12, 96, 256)
    (*tokens, state), cotangents, _ = make(Case("bfloat16", sizes))
    scale = 10.0 ** jax.random.uniform(jax.random.key(1), (128, 12, 1, 1), minval=-5, maxval=5)
    q, k, v, g, beta = (x[:, 0] for x in tokens)
    # The last row is padding.
    g, beta = (x.at[-1].set(0) for x in (g, beta))
    v = (v * jnp.squeeze(scale, -1)).astype(v.dtype)
    state = (state * scale).astype(state_dtype)
    o, new = jax.jit(STEP)(q, k, v, g, beta, state)
    assert bool(jnp.isfinite(o).all()) and bool(jnp.isfinite(new).all())
    np.testing.assert_array_equal(new[-1], state[-1])
    token = tuple(x[:, None] for x in (q, k, v, g, beta))
    exact = compile_recurrence(sizes)((*token, state), cotangents)
    errors = [x.max() for x in errors_per_head((o[:, None], new), exact[:2])]
    print(f"\n{state_dtype} state, one step: o {errors[0]:.1e} state {errors[1]:.1e}")
    assert errors[0] <= LIMITS["bfloat16"]
    assert errors[1] <= LIMITS[state_dtype]
