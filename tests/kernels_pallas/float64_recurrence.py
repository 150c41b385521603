"""The gated delta rule token by token in float64, compiled for the device at hand.

For sequences that NumPy would take minutes for: thousands of tokens on a GPU. It shares no code
with the library; segment borders come from `kernel_oracles.runs`, gradients from JAX.
"""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np

BLOCK = 128  # tokens whose states are recomputed at a time, so that few states are kept


def borders(segment_ids):
    """Returns which tokens are real, and which begin a segment other than the row's first."""
    starts = np.zeros(np.shape(segment_ids), bool)
    for row, ids in enumerate(np.asarray(segment_ids)):
        starts[row, [start for start, _ in oracle.runs(ids)[1:]]] = True
    return np.asarray(segment_ids) != 0, starts


def _normalised(x):
    return x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _step(state, token):
    q, k, v, g, beta, real, start = token
    before = jnp.where(start, 0.0, state)
    decayed = jnp.exp(g)[..., None, None] * before
    delta = beta[..., None] * (v - jnp.sum(decayed * k[..., None], axis=-2))
    after = decayed + k[..., None] * delta[..., None, :]
    o = jnp.where(real[..., 0], jnp.sum(after * q[..., None], axis=-2), 0.0)
    return jnp.where(real, after, state), o


@jax.checkpoint
def _block(state, tokens):
    return jax.lax.scan(jax.checkpoint(_step), state, tokens)


def _outputs(q, k, v, g, beta, state, real, starts):
    repeats = v.shape[2] // q.shape[2]
    q, k = _normalised(q) * q.shape[-1] ** -0.5, _normalised(k)
    q, k = (jnp.repeat(x, repeats, axis=2) for x in (q, k))
    real, starts = (x[..., None, None, None] for x in (real, starts))
    length = v.shape[1]

    def cut(x):  # padded with tokens that are not real
        x = jnp.pad(x, [(0, 0), (0, -length % BLOCK)] + [(0, 0)] * (x.ndim - 2))
        x = jnp.moveaxis(x, 1, 0)
        return x.reshape(-1, BLOCK, *x.shape[1:])

    state, o = jax.lax.scan(_block, state, [cut(x) for x in (q, k, v, g, beta, real, starts)])
    o = jnp.moveaxis(o.reshape(-1, *o.shape[2:]), 0, 1)[:, :length]
    return o, state


@jax.jit
def _all(inputs, cotangents, real, starts):
    to64 = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64))
    outputs, pull = jax.vjp(lambda *x: _outputs(*x, real, starts), *to64(inputs))
    return *outputs, *pull(to64(cotangents))


@functools.cache
def compile_recurrence(sizes):
    """Compiles the recurrence with q and k normalised and the queries scaled by 1/sqrt(K).

    Args:
      sizes: B, T, H, HV, K and V.

    Returns:
      A function of (inputs, cotangents, segment_ids or None): o, the state and the gradients of
      q, k, v, g, beta and the state, all float64.
    """
    b, t, h, hv, k, v = sizes
    keys, values, row, state = (b, t, h, k), (b, t, hv, v), (b, t, hv), (b, hv, k, v)

    def shapes(*all_shapes):
        return tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in all_shapes)

    flags = jax.ShapeDtypeStruct((b, t), bool)
    with jax.enable_x64(True):
        compiled = _all.lower(
            shapes(keys, keys, values, row, row, state), shapes(values, state), flags, flags
        ).compile()

    def run(inputs, cotangents, segment_ids=None):
        ids = np.ones((b, t), np.int32) if segment_ids is None else segment_ids
        arrays = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, cotangents))
        with jax.enable_x64(True):
            return compiled(*arrays, *(jnp.asarray(x) for x in borders(ids)))

    return run


@functools.partial(jax.jit, static_argnames="axes")
def _errors(got, expected, axes):
    got = got.astype(jnp.float64)
    norm = jnp.sqrt(jnp.sum(expected**2, axis=axes))
    return jnp.sqrt(jnp.sum((got - expected) ** 2, axis=axes)) / jnp.maximum(norm, 1e-30)


def errors_per_head(got, expected):
    """Returns relative Frobenius errors [B, H] of rows [B, T, H, ...], or of states [B, H, ...]."""
    with jax.enable_x64(True):
        return [
            np.asarray(_errors(x, y, tuple(i for i in range(x.ndim) if i not in (0, at))))
            for x, y, at in zip(got, expected, (2, 1, 2, 2, 2, 2, 2, 1), strict=False)
        ]
