"""The short convolution's kernels on a GPU, at the models' widths, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_dynamic_conv_gpu import IDS, B, D, T, W, derive, is_own

from kernels_pallas import short_conv

pytestmark = pytest.mark.gpu

LIMITS = {"float32": 3e-6, "bfloat16": 8e-3}
NAMES = ("y", "tail", "du", "dw", "db", "dtail")


@functools.partial(jax.jit, static_argnames=("dtype", "width", "channels"))
def make(dtype, width=W, channels=D):
    """Returns inputs and cotangents."""
    rows, tail = (B, T, channels), (B, width - 1, channels)
    shapes = [rows, (width, channels), (channels,), tail, rows, tail]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]
    return tuple(arrays[:4]), tuple(arrays[4:])


def exact_conv(u, w, b, tail, own, activation):
    rows = jnp.concatenate([tail, u], axis=1)
    width = len(w)
    x = b + sum(w[j] * jnp.where(own[j][..., None], rows[:, j : j + T], 0) for j in range(width))
    y = jax.nn.silu(x) if activation == "silu" else x
    return jnp.where(own[-1][..., None], y, 0), rows[:, T:]


def conv(u, w, b, tail, activation, segment_ids):
    return short_conv(
        u,
        w,
        b,
        activation=activation,
        tail=tail,
        segment_ids=segment_ids,
        implementation="pallas",
    )


def check(inputs, cotangents, own, activation, segment_ids, limit):
    """Compares outputs and gradients with float64, and with a second run."""
    op = functools.partial(conv, activation=activation, segment_ids=segment_ids)
    run = jax.jit(functools.partial(derive, op))
    got, again = run(inputs, cotangents), run(inputs, cotangents)
    for name, x, y in zip(NAMES, got, again, strict=True):
        assert bool(jnp.array_equal(x, y)), f"{name} differs on repeat"
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64), single)
        exact = functools.partial(exact_conv, own=own, activation=activation)
        want = jax.jit(functools.partial(derive, exact))(*double)
        norm = jnp.linalg.norm
        errors = {n: float(norm(x - y) / norm(y)) for n, x, y in zip(NAMES, got, want, strict=True)}
    print("\n" + " ".join(f"{name} {x:.1e}" for name, x in errors.items()))
    assert max(errors.values()) <= limit, errors


@pytest.mark.parametrize("dtype", LIMITS)
def test_packed_rows_with_a_tail(dtype):
    inputs, cotangents = make(dtype)
    check(inputs, cotangents, is_own(), "silu", IDS, LIMITS[dtype])


@pytest.mark.parametrize(("width", "activation"), [(2, None), (7, "silu")])
def test_whole_rows_of_channels_that_strips_do_not_divide(width, activation):
    inputs, cotangents = make("float32", width, 1040)
    own = np.ones((width, B, T), bool)
    check(inputs, cotangents, own, activation, None, LIMITS["float32"])


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_no_nan_at_any_scale(scale):
    (u, *rest), cotangents = make("bfloat16")
    op = functools.partial(conv, activation="silu", segment_ids=IDS)
    result = jax.jit(functools.partial(derive, op))(
        ((u * scale).astype(u.dtype), *rest), cotangents
    )
    for name, x in zip(NAMES, result, strict=True):
        assert bool(jnp.isfinite(x).all()), name
