"""The chunked kda and dplr_delta_rule: rounding, what is kept, and decays beyond measure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import SEGMENTS
from vector_delta import (
    CASES,
    assert_close,
    make,
    oracle,
    outputs_and_gradients,
    run,
)


@pytest.mark.parametrize(
    "case", ["plain", "no decay, beta 1, keys alike", "weak beside strong decay"]
)
@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_bfloat16_stays_within_its_rounding(op, case):
    inputs, cotangents = make(op, jnp.bfloat16, **CASES[case])
    got = outputs_and_gradients(op, inputs, SEGMENTS, cotangents, "xla", 64)
    assert_close(op, got, oracle(op, inputs, SEGMENTS, cotangents))
    assert got[0].dtype == got[2].dtype == jnp.bfloat16
    assert got[1].dtype == got[-1].dtype == jnp.float32


@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_derivative_keeps_the_inputs_and_the_inverse(op):
    inputs, _ = make(op)
    batch, length, heads, _ = inputs[2].shape

    def kept(implementation):
        pull = jax.eval_shape(
            lambda *x: jax.vjp(lambda *y: run(op, y, None, implementation, 16), *x)[1], *inputs
        )
        return sum(x.size for x in jax.tree.leaves(pull) if x.ndim)

    inverse = batch * (length + -length % 16) * heads * 16
    assert kept("xla") == sum(x.size for x in inputs) + inverse
    states = batch * length * heads * inputs[-1].shape[-2] * inputs[-1].shape[-1]
    assert kept("reference") > states  # the measure sees them


@pytest.mark.parametrize("op", ["kda", "dplr"])
def test_wild_decays_stay_finite(op):
    """Sums of log decays far beyond what float32's exponent holds, and minus infinity."""
    inputs, cotangents = make(op, decay=(1e-3, 1e4))
    at = -2 if op == "dplr" else -3
    inputs = list(inputs)
    inputs[at] = inputs[at].at[:, 7::11, :, ::3].set(-jnp.inf)
    got = outputs_and_gradients(op, tuple(inputs), SEGMENTS, cotangents, "xla", 64)
    assert all(np.isfinite(x).all() for x in got)
    finite = [np.maximum(x, -1e4) for x in inputs]
    assert_close(op, got, oracle(op, finite, SEGMENTS, cotangents))
