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

# float32 states stay as exact as o is stored; bfloat16 ones are rounded after every step.
LIMITS = {("float32", "float32"): (3e-6, 3e-6), ("bfloat16", "float32"): (8e-3, 3e-6)}
LENGTH = 200
STEP = functools.partial(gated_delta_step, use_qk_l2norm=True, implementation="pallas")


@jax.jit
def steps(tokens, state):
    def step(state, token):
        o, state = STEP(*token, state)
        return state, o

    state, o = jax.lax.scan(step, state, [jnp.moveaxis(x, 1, 0) for x in tokens])
    return jnp.moveaxis(o, 0, 1), state


@pytest.mark.parametrize("widths", [(96, 256), (128, 256), (256, 576)])
@pytest.mark.parametrize("dtypes", LIMITS)
def test_steps_follow_the_recurrence(dtypes, widths):
    (*tokens, state), cotangents, _ = make(Case(dtypes[0], (2, LENGTH, 12, 12, *widths)))
    o, last = steps(tokens, state)
    again = steps(tokens, state)
    assert bool(jnp.array_equal(o, again[0])) and bool(jnp.array_equal(last, again[1]))
    exact = compile_recurrence((*tokens, state), cotangents)((*tokens, state), cotangents)
    errors = errors_per_head((o, last), exact[:2])
    print(f"\n{dtypes} {widths}: o and state per head")
    for label, e, f in zip([*CORNERS, *range(6, 12)], *(x.max(0) for x in errors), strict=True):
        print(f"{label!s:20} {e:.1e} {f:.1e}")
    assert all((e <= limit).all() for e, limit in zip(errors, LIMITS[dtypes], strict=True))


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_thousand_random_states(state_dtype):
    """One step of 1,536 heads: finite at every scale, exact but for rounding, padding kept."""
    (*tokens, state), cotangents, _ = make(Case("bfloat16", (128, 1, 12, 12, 96, 256)))
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
    inputs = (*token, state.astype(jnp.float32))
    exact = compile_recurrence(inputs, cotangents)(inputs, cotangents)
    errors = errors_per_head((o[:, None], new), exact[:2])
    print(f"\n{state_dtype} state, one step: o {errors[0].max():.1e} state {errors[1].max():.1e}")
    assert errors[0].max() <= 8e-3
    assert errors[1].max() <= (3e-6 if state_dtype == "float32" else 8e-3)
