"""The instructions that kernels spell out for a GPU, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from kernels_pallas import backend

pytestmark = pytest.mark.gpu
SIZE = 1024


def run(function, *arrays):
    def body(*refs):
        *inputs, out = refs
        out[...] = function(*(ref[...] for ref in inputs))

    spec = pl.BlockSpec((SIZE,), lambda i: (i,))
    call = backend.pallas(
        body,
        name="one_instruction",
        grid=(1,),
        in_specs=[spec] * len(arrays),
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct((SIZE,), jnp.float32),
    )
    return np.asarray(jax.jit(call)(*arrays), np.float64)


def test_multiply_add_is_rounded_once():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=SIZE).astype(np.float32) for _ in range(2))
    c = -(a * b)  # what is left is the product's rounding error, which two roundings lose
    exact = a.astype(np.float64) * b + c
    got = run(backend.multiply_add, a, b, c)
    np.testing.assert_array_equal(got, exact)
    assert np.any(exact)


def test_sigmoid():
    x = np.linspace(-80, 80, SIZE).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    error = np.abs(run(backend.sigmoid, x) - exact) / exact
    assert np.all(error <= 4e-7 + np.abs(x) * 2**-23)
