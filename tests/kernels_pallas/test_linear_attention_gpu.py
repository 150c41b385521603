"""Linear attention's kernels on a GPU: long rows against the recurrence in float64.

`pytest -n 0 -m gpu -s` prints the errors of every case.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from linear_attention_float64 import errors, recurrence
from linear_attention_inputs import NAMES

from kernels_pallas import linear_attention, linear_attention_step

pytestmark = pytest.mark.gpu

# Name of each case: dtype, (B T H HV K V), one decay a head or a channel, and the range of -g,
# log-uniform. T is no multiple of a chunk; the last case's T is cut into segments.
CASES = {
    "RetNet": ("bfloat16", (2, 4113, 4, 4, 192, 384), "head", (1e-3, 0.1)),
    "GLA": ("bfloat16", (2, 4113, 4, 4, 192, 384), "channel", (1e-4, 0.2)),
    "GLA, of every size": ("bfloat16", (2, 4113, 2, 4, 192, 384), "channel", (1e-5, 100.0)),
    "Mamba2": ("bfloat16", (2, 4113, 1, 24, 96, 64), "head", (1e-4, 1.0)),
    "float32, one a head": ("float32", (1, 4113, 2, 4, 96, 256), "head", (1e-5, 100.0)),
    "float32, one a channel": ("float32", (1, 4113, 2, 4, 96, 256), "channel", (1e-5, 100.0)),
    "GLA, T cut": ("bfloat16", (1, 16384, 2, 2, 192, 384), "channel", (1e-4, 0.2)),
}


@functools.partial(jax.jit, static_argnames=("dtype", "sizes", "kind", "decay"))
def make(dtype, sizes, kind, decay):
    """Returns inputs q, k, v, g, state and cotangents, made on the device."""
    b, t, h, hv, k, v = sizes
    keys = jax.random.split(jax.random.key(0), 7)
    shapes = (b, t, h, k), (b, t, h, k), (b, t, hv, v), (b, t, hv, v)
    q, key, value, do = (
        jax.random.normal(x, s).astype(dtype) for x, s in zip(keys, shapes, strict=False)
    )
    low, high = jnp.log(decay[0]), jnp.log(decay[1])
    shape = (b, t, hv) if kind == "head" else (b, t, hv, k)
    g = -jnp.exp(jax.random.uniform(keys[4], shape, minval=low, maxval=high))
    state, dstate = (jax.random.normal(x, (b, hv, k, v)) for x in keys[5:])
    return (q, key, value, g, state), (do, dstate)


@jax.jit
def outputs_and_gradients(inputs, segment_ids, cotangents):
    def run(q, k, v, g, state):
        return linear_attention(
            *(q, k, v, g), initial_state=state, segment_ids=segment_ids, implementation="pallas"
        )

    outputs, pull = jax.vjp(run, *inputs)
    return *outputs, *pull(cotangents)


def packed(batch, length):
    """Segment ids with leading padding, a border inside a chunk, and a gap."""
    ids = np.zeros((batch, length), np.int32)
    ids[:, 5 : length // 3], ids[:, length // 3 : length // 2 + 7] = 1, 2
    ids[:, length // 2 + 20 :] = 3
    return jnp.asarray(ids)


@pytest.mark.parametrize("case", CASES)
def test_long_rows_match_the_recurrence(case):
    dtype, sizes, *_ = CASES[case]
    inputs, cotangents = make(*CASES[case])
    ids = packed(*sizes[:2])
    got = outputs_and_gradients(inputs, ids, cotangents)
    again = outputs_and_gradients(inputs, ids, cotangents)
    assert all(bool(jnp.array_equal(x, y)) for x, y in zip(got, again, strict=True))
    assert all(bool(jnp.isfinite(x).all()) for x in got)
    found = dict(zip(NAMES, errors(got, recurrence(inputs, ids, cotangents)), strict=True))
    print(f"\n{case:24}", " ".join(f"{name} {x:.1e}" for name, x in found.items()))
    limits = oracle.LIMITS[dtype]
    assert all(x <= limits[name] for name, x in found.items())


STEPS = {  # B 1 H HV K V, and the decay's kind
    "RetNet": ((32, 1, 4, 4, 192, 384), "head"),
    "GLA": ((32, 1, 4, 4, 192, 384), "channel"),
    "Mamba2": ((32, 1, 1, 48, 96, 64), "head"),
    "no decay": ((32, 1, 2, 4, 96, 256), None),
}


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", STEPS)
def test_steps(case, state_dtype):
    sizes, kind = STEPS[case]
    inputs, cotangents = make("bfloat16", sizes, kind or "head", (1e-4, 1.0))
    q, k, v, g, state = inputs
    state = state.astype(state_dtype)
    tokens = q, k, v, jnp.zeros_like(g) if kind is None else g
    exact = recurrence((*tokens, state), np.ones((32, 1)), cotangents)
    step = jax.jit(functools.partial(linear_attention_step, implementation="pallas"))
    token = (x[:, 0] for x in (q, k, v))
    o, last = step(*token, None if kind is None else g[:, 0], state)
    found = errors((o[:, None], last), exact[:2])
    print(f"\n{case}, {state_dtype} state: o {found[0]:.1e} state {found[1]:.1e}")
    assert found[0] <= 8e-3 and found[1] <= (3e-6 if state_dtype == "float32" else 4e-3)
