"""The TPU's attention kernel, interpreted, against XLA with a mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jet_jax.mixers import attend
from jet_jax.mixers.splash import splash_attention, supports
from jet_jax.sharding import make_mesh

B, T, H, N, D = 4, 128, 4, 2, 16


def test_packed_window_forward_and_gradient_under_a_mesh():
    shapes = ((B, T, H, D), (B, T, N, D), (B, T, N, D))
    q, k, v = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate(shapes))
    ids = jnp.asarray(np.repeat([[1, 2, 0]], [50, 60, 18], axis=1).repeat(B, 0), jnp.int32)
    weight = jax.random.normal(jax.random.key(9), q.shape) * (ids != 0)[..., None, None]
    options = {"scale": 0.3, "window": 30, "segment_ids": ids}

    def value_and_grads(attention, **more):
        def loss(q, k, v):
            return jnp.sum(attention(q, k, v, **options, **more) * weight)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(q, k, v)

    want = value_and_grads(attend.causal)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got = value_and_grads(splash_attention, interpret=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        ((1, 256, 2, 64), jnp.bfloat16, True),
        ((1, 200, 2, 64), jnp.bfloat16, False),
        ((1, 256, 2, 64), jnp.float32, False),
    ],
)
def test_supports(shape, dtype, fits):
    assert supports(jnp.zeros(shape, dtype)) is fits
