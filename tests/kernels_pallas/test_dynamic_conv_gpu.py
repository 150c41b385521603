"""The dynamic convolution's kernels on a GPU, at the 2B model's widths, against float64."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest

from kernels_pallas import dynamic_conv

pytestmark = pytest.mark.gpu

LIMITS = {"float32": 3e-6, "bfloat16": 8e-3}
NAMES = ("v", "tail", "du", "dh", "dw2", "db2", "dtail")
B, T, D, R, W = 2, 4101, 3072, 384, 4
# Documents that start on, before and after the borders of any tile, with padding between two.
IDS = np.stack([np.repeat([1, 2, 3, 0, 4, 5], [2000, 48, 1, 15, 2032, 5]), np.ones(T)])
IDS = IDS.astype(np.int32)


def is_own():
    """Returns [W, B, T]: whether row t - (W-1) + j belongs to token t, the tail's rows included."""
    own = np.zeros((W, *IDS.shape), bool)
    for b, ids in enumerate(IDS):
        for index, (start, stop) in enumerate(oracle.runs(ids)):
            t = np.arange(start, stop)
            first = start if index else start - (W - 1)
            for j in range(W):
                own[j, b, t] = t - (W - 1) + j >= first
    return own


@functools.partial(jax.jit, static_argnames="dtype")
def make(dtype):
    """Returns inputs and cotangents; taps are about 1 in size."""
    shapes = [(B, T, D), (B, T, R), (R, W, D), (W, D), (B, W - 1, D), (B, T, D), (B, W - 1, D)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    arrays[2] = arrays[2] * R**-0.5
    arrays = [x.astype(dtype) for x in arrays]
    return tuple(arrays[:5]), tuple(arrays[5:])


def exact_conv(u, h, w2, b2, tail, own):
    rows = jnp.concatenate([tail, u], axis=1)
    taps = jnp.einsum("btr,rjd->jbtd", h, w2) + b2[:, None, None]
    total = sum(taps[j] * jnp.where(own[j][..., None], rows[:, j : j + T], 0) for j in range(W))
    return jnp.where(own[-1][..., None], jax.nn.silu(total), 0), rows[:, T:]


def conv(u, h, w2, b2, tail):
    return dynamic_conv(u, h, w2, b2, tail=tail, segment_ids=IDS, implementation="pallas")


def derive(function, inputs, cotangents):
    outputs, pull = jax.vjp(function, *inputs)
    return *outputs, *pull(cotangents)


@jax.jit
def exact(inputs, cotangents, own):
    inputs, cotangents = jax.tree.map(lambda x: x.astype(jnp.float64), (inputs, cotangents))
    return derive(lambda *x: exact_conv(*x, own), inputs, cotangents)


@pytest.mark.parametrize("dtype", LIMITS)
def test_packed_rows_with_a_tail(dtype):
    inputs, cotangents = make(dtype)
    run = jax.jit(functools.partial(derive, conv))
    got, again = run(inputs, cotangents), run(inputs, cotangents)
    for name, x, y in zip(NAMES, got, again, strict=True):
        assert bool(jnp.array_equal(x, y)), f"{name} differs on repeat"
    single = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    with jax.enable_x64(True):
        want = exact(*single, is_own())
        norm = jnp.linalg.norm
        errors = {n: float(norm(x - y) / norm(y)) for n, x, y in zip(NAMES, got, want, strict=True)}
    print(f"\n{dtype}: " + " ".join(f"{name} {x:.1e}" for name, x in errors.items()))
    assert max(errors.values()) <= LIMITS[dtype], errors


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_no_nan_at_any_scale(scale):
    (u, *rest), cotangents = make("bfloat16")
    result = jax.jit(functools.partial(derive, conv))(
        ((u * scale).astype(u.dtype), *rest), cotangents
    )
    for name, x in zip(NAMES, result, strict=True):
        assert bool(jnp.isfinite(x).all()), name
