"""Linear attention token by token in float64, compiled for the device at hand.

For sequences that NumPy would take minutes for: thousands of tokens on a GPU. It shares no code
with the library; gradients are JAX's.
"""

import functools

import jax
import jax.numpy as jnp
from float64_recurrence import BLOCK, borders


def _step(state, token):
    q, k, v, g, real, start = token
    before = jnp.where(start, 0.0, state)
    after = jnp.exp(g)[..., None] * before + k[..., None] * v[..., None, :]
    o = jnp.where(real[..., 0], jnp.sum(after * q[..., None], axis=-2), 0.0)
    return jnp.where(real, after, state), o


@jax.checkpoint
def _block(state, tokens):
    return jax.lax.scan(jax.checkpoint(_step), state, tokens)


def _outputs(q, k, v, g, state, real, starts):
    repeats = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, repeats, axis=2) for x in (q * q.shape[-1] ** -0.5, k))
    g = g if g.ndim == 4 else g[..., None]
    real, starts = (x[..., None, None, None] for x in (real, starts))

    def cut(x):  # padded with tokens that are not real
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % BLOCK)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(-1, BLOCK, *x.shape[1:])

    state, o = jax.lax.scan(_block, state, [cut(x) for x in (q, k, v, g, real, starts)])
    return jnp.moveaxis(o.reshape(-1, *o.shape[2:]), 0, 1)[:, : v.shape[1]], state


@jax.jit
def _all(inputs, cotangents, real, starts):
    to64 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64))
    outputs, pull = jax.vjp(lambda *x: _outputs(*x, real, starts), *to64(inputs))
    return *outputs, *pull(to64(cotangents))


def recurrence(inputs, segment_ids, cotangents):
    """Returns o, the state and the gradients of q, k, v, g and the state, all float64."""
    arrays = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
    real, starts = borders(segment_ids)
    with jax.enable_x64(True):
        return _all(*arrays, jnp.asarray(real), jnp.asarray(starts))


@functools.partial(jax.jit, static_argnames="axes")
def _errors(got, expected, axes):
    got = got.astype(jnp.float64)
    norm = jnp.sqrt(jnp.sum(expected**2, axis=axes))
    return jnp.max(jnp.sqrt(jnp.sum((got - expected) ** 2, axis=axes)) / jnp.maximum(norm, 1e-30))


def errors(got, expected):
    """Returns the largest relative Frobenius error of a head of rows [B, T, H, ...] or states."""
    with jax.enable_x64(True):
        return [
            float(_errors(x, y, tuple(i for i in range(x.ndim) if i not in (0, at))))
            for x, y, at in zip(got, expected, (2, 1, 2, 2, 2, 2, 1), strict=False)
        ]
