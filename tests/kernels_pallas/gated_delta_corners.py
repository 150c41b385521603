"""Large inputs for the gated delta rule on a GPU; each head is a corner of the input space."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Name of each corner: (log decays from .. to, writing strength, mean cosine of two keys).
CORNERS = {
    "SiLU keys": ((1e-3, 0.5), None, None),
    "g=0 beta=1 cos .9": ((0.0, 0.0), 1.0, 0.9),
    "g=-20": ((20.0, 20.0), None, None),
    "g=-1e-5..-100": ((1e-5, 100.0), None, None),
    "beta .95 cos .9": ((1e-3, 0.1), 0.95, 0.9),
    "beta=1 cos .9": ((1e-4, 1e-2), 1.0, 0.9),
}
MODEL = 6  # heads with decays as a model has them


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled shape."""

    dtype: str
    sizes: tuple[int, ...]  # B T H HV K V
    packed: bool = False
    is_split: bool = True  # T may be cut into segments


def similar_keys(noise, cosine):
    common = jnp.abs(jax.random.normal(jax.random.key(1), noise.shape[-1:]))
    return common * np.sqrt(cosine) + noise * np.sqrt(1 - cosine)


@functools.partial(jax.jit, static_argnames="case")
def make(case):
    """Returns inputs and cotangents; of the model's heads also a, A_log and dt_bias."""
    b, t, h, hv, k, v = case.sizes
    keys = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    wide = jax.nn.silu(normal(b, t, h, k)), normal(b, t, h, k), normal(b, t, hv, v)
    beta, do = jax.nn.sigmoid(normal(b, t, hv)), normal(b, t, hv, v)
    state, dstate = 0.1 * normal(b, hv, k, v), 0.1 * normal(b, hv, k, v)
    q, noise, value = wide
    key, random = jax.nn.silu(noise), jax.random.uniform(next(keys), (b, t, hv))
    a_log = jnp.log(jnp.linspace(0.1, 16, hv))
    dt = jnp.geomspace(0.1, 1e-3, hv)
    dt_bias, a = dt + jnp.log(-jnp.expm1(-dt)), normal(b, t, hv)
    g = decays(a, a_log, dt_bias)
    for i, ((low, high), strength, cosine) in enumerate(CORNERS.values()):
        if i >= h:
            continue
        # Up to 100 at even odds in the logarithm, and exactly 0 or -20 where both ends are.
        drawn = jnp.exp(jnp.log(low) + random[..., i] * jnp.log(high / low)) if low else 0.0
        g = g.at[..., i].set(-drawn)
        beta = beta if strength is None else beta.at[..., i].set(strength)
        key = key if cosine is None else key.at[:, :, i].set(similar_keys(noise[:, :, i], cosine))
    dtype = jnp.dtype(case.dtype)
    q, key, value, do = (x.astype(dtype) for x in (q, key, value, do))
    return (q, key, value, g, beta, state), (do, dstate), (a, a_log, dt_bias)


def decays(a, a_log, dt_bias):
    return -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias)
