"""cuDNN's attention paths on the card against float32 XLA, forward, gradient and over a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jet_jax.cache import KVState, WindowState
from jet_jax.mixers import attend
from jet_jax.mixers.context import Context

pytestmark = pytest.mark.gpu

B, T, H, N, D, S, W = 2, 192, 4, 2, 64, 512, 100
TOLERANCE = 1e-2  # bfloat16 inputs and probabilities, relative L2
SCALE = D**-0.5


def qkv(length, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((B, length, H, D), (B, length, N, D), (B, length, N, D))
    return [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def f32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def uses_fused_attention(function, *args):
    return "__cudnn$fmha" in jax.jit(function).lower(*args).compile().as_text()


@pytest.mark.parametrize("window", [None, W])
@pytest.mark.parametrize("packed", [False, True])
def test_training(window, packed):
    q, k, v = qkv(T)
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0]], [70, 60, 50, 12], axis=1).repeat(B, 0), jnp.int32)
    ids = ids if packed else None
    weight = jax.random.normal(jax.random.key(9), (B, T, H, D), jnp.float32)
    weight = weight if ids is None else weight * (ids != 0)[..., None, None]

    def loss(q, k, v):
        y = attend.causal(q, k, v, scale=SCALE, window=window, segment_ids=ids)
        return jnp.sum(y.astype(jnp.float32) * weight)

    assert uses_fused_attention(loss, q, k, v)
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    for got, want in zip(step(q, k, v), step(*f32([q, k, v])), strict=True):
        assert error(got, want) < 2 * TOLERANCE
    y = attend.causal(q, k, v, scale=SCALE, window=window, segment_ids=ids)
    y32 = attend.causal(*f32([q, k, v]), scale=SCALE, window=window, segment_ids=ids)
    real = np.ones((B, T), bool) if ids is None else np.asarray(ids != 0)
    assert error(np.asarray(y, np.float32)[real], np.asarray(y32)[real]) < TOLERANCE


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("length", [1, 48])
def test_over_a_cache(kind, length):
    """Rows that have seen 0 and 300 tokens, the second chunk's last tokens padding."""
    q, k, v = qkv(length, seed=1)
    size = S if kind == "full" else W
    rng = jax.random.split(jax.random.key(2), 2)
    make = KVState if kind == "full" else WindowState
    state = make(*(jax.random.normal(r, (B, size, N, D), jnp.bfloat16) for r in rng))
    lengths = jnp.asarray([0, 300], jnp.int32)
    real = np.ones((B, length), np.int32)
    if length > 1:
        real[1, -10:] = 0
    positions = lengths[:, None] + jnp.cumsum(jnp.asarray(real), 1, dtype=jnp.int32) - 1
    ctx = Context(jnp.asarray(real), positions, lengths)
    step = attend.cache_step if kind == "full" else attend.window_step

    def run(q, k, v, state):
        return step(q, k, v, state, ctx, scale=SCALE)

    assert uses_fused_attention(run, q, k, v, state)
    y, new = jax.jit(run)(q, k, v, state)
    y32, new32 = jax.jit(run)(*f32([q, k, v]), f32(state))
    rows = real.astype(bool)
    assert np.isfinite(np.asarray(y, np.float32)[rows]).all()
    assert error(np.asarray(y, np.float32)[rows], np.asarray(y32)[rows]) < TOLERANCE
    for got, want in zip(jax.tree.leaves(new), jax.tree.leaves(new32), strict=True):
        assert np.array_equal(np.asarray(got, np.float32), np.asarray(want))
