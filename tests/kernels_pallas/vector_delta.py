"""Inputs of the tests of kda and dplr_delta_rule, and the operations in float64.

The float64 recurrences share no code with the library: a scan over single tokens, segments by
`float64_recurrence.borders`, gradients by JAX.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from float64_recurrence import borders
from gated_delta_inputs import error, platform_of

from kernels_pallas import dplr_delta_rule, dplr_delta_rule_step, kda, kda_step

# B T H HV K V, as small as each implementation takes; dplr has HV heads of everything.
SIZES = dict.fromkeys(("reference", "xla"), (3, 150, 2, 4, 8, 12))
SIZES |= dict.fromkeys(("pallas", "pallas for a TPU"), (3, 150, 1, 2, 64, 64))
OPS = {"kda": kda, "dplr": dplr_delta_rule}
STEPS = {"kda": kda_step, "dplr": dplr_delta_rule_step}
# Names of the inputs of each, which are in the order of the functions' arguments.
NAMES = {
    "kda": ("q", "k", "v", "g", "beta", "initial_state"),
    "dplr": ("q", "k", "v", "a", "b", "g", "initial_state"),
}
# Relative Frobenius errors; why: see kernel_oracles.LIMITS.
LIMITS = {"float32": (3e-6, 2e-5), "bfloat16": (8e-3, 1e-2)}  # all but dg, and dg
# The oracle runs long and is compiled once: with the optimizations that conftest.py leaves out.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
CASES = {
    "plain": {},
    "no decay, beta 1, keys alike": dict(decay=(0.0, 0.0), beta=1.0, alike=0.9),
    "strong decay": dict(decay=(20.0, 20.0)),
    "decay 100": dict(decay=(100.0, 100.0)),
    "weak beside strong decay": dict(decay=(1e-5, 100.0)),
    "keys alike": dict(beta=0.95, alike=0.9),
}


def make(op, dtype=jnp.float32, sizes=SIZES["xla"], decay=(1e-3, 0.5), beta=None, alike=0.0):
    """Returns inputs and cotangents.

    Args:
      op: "kda" or "dplr".
      dtype: of q, k, v, a, b and o.
      sizes: B, T, H, HV, K and V.
      decay: range of -g, log-uniform per key channel; all the same where both ends are equal.
      beta: writing strength of kda, and RWKV-7's learning rate; None draws them.
      alike: mean cosine of two keys.
    """
    rng = np.random.default_rng(0)
    b, t, h, hv, k, v = sizes
    h = hv if op == "dplr" else h
    common = np.abs(rng.normal(size=k)) * alike**0.5
    keys = common + rng.normal(size=(b, t, h, k)) * (1 - alike) ** 0.5
    low, high = decay
    if low == high:
        g = np.full((b, t, hv, k), -low)
    else:
        g = -np.exp(rng.uniform(np.log(low), np.log(high), size=(b, t, hv, k)))
    rate = 1 / (1 + np.exp(-rng.normal(size=(b, t, hv, k) if op == "dplr" else (b, t, hv))))
    rate = rate if beta is None else np.full_like(rate, beta)
    q, value, do = (rng.normal(size=s) for s in ((b, t, h, k), (b, t, hv, v), (b, t, hv, v)))
    state, dstate = 0.1 * rng.normal(size=(2, b, hv, k, v))
    wide = [q, keys, value]
    if op == "dplr":  # as RWKV-7 has them; keys apart from those that remove
        kappa = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
        wide[1] = k**-0.5 * (keys + rng.normal(size=keys.shape))
        wide += [-kappa, kappa * rate]
    wide = [jnp.asarray(x, dtype) for x in wide]
    small = [g] if op == "dplr" else [g, rate]
    small = [jnp.asarray(x, jnp.float32) for x in (*small, state)]
    return (*wide, *small), (jnp.asarray(do, dtype), jnp.asarray(dstate, jnp.float32))


def _scan(op, inputs, real, starts):
    *inputs, initial = inputs
    if op == "kda":
        q, k, v, g, beta = inputs
        q, k = (x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
        q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
        inputs = q * q.shape[-1] ** -0.5, k, v, g, beta[..., None]

    @jax.checkpoint  # else all the states are kept, and copied once for each token
    def step(state, token):
        *token, real, start = token
        before = jnp.where(start[:, None, None, None], 0.0, state)
        if op == "kda":
            q, k, v, g, beta = token
            after = jnp.exp(g)[..., None] * before
            delta = beta * (v - jnp.sum(after * k[..., None], axis=-2))
            after = after + k[..., None] * delta[..., None, :]
        else:
            q, k, v, a, b, g = token
            read = jnp.sum(before * a[..., None], axis=-2)
            after = jnp.exp(g)[..., None] * before + k[..., None] * v[..., None, :]
            after = after + b[..., None] * read[..., None, :]
        o = jnp.sum(after * q[..., None], axis=-2)
        real = real[:, None, None]
        return jnp.where(real[..., None], after, state), jnp.where(real, o, 0.0)

    by_token = [jnp.moveaxis(x, 1, 0) for x in (*inputs, real, starts)]
    state, o = jax.lax.scan(step, initial, by_token)
    return jnp.moveaxis(o, 0, 1), state


@functools.partial(jax.jit, static_argnames="op", compiler_options=OPTIMIZED)
def _in_float64(op, inputs, cotangents, real, starts):
    outputs, pull = jax.vjp(lambda *x: _scan(op, x, real, starts), *inputs)
    return *outputs, *pull(cotangents)


def oracle(op, inputs, segment_ids, cotangents):
    """Returns o, the state and the gradients of all inputs, float64; kda with l2-norm."""
    ids = np.ones(inputs[0].shape[:2], np.int32) if segment_ids is None else segment_ids
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), (tuple(inputs), cotangents))
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, _in_float64(op, *arrays, *borders(ids)))


def run(op, inputs, segment_ids, implementation, chunk_size):
    """Calls the operation."""
    *inputs, state = inputs
    options = dict(use_qk_l2norm=True) if op == "kda" else {}
    return OPS[op](
        *inputs,
        initial_state=state,
        segment_ids=segment_ids,
        chunk_size=chunk_size,
        implementation=implementation,
        **options,
    )


forward = jax.jit(run, static_argnames=("op", "implementation", "chunk_size"))


@functools.partial(jax.jit, static_argnames=("op", "implementation", "chunk_size"))
def outputs_and_gradients(op, inputs, segment_ids, cotangents, implementation, chunk_size):
    """Returns o, the state and the gradients of all inputs."""
    name, interpreter = platform_of(implementation)
    with interpreter:  # also while the backward pass is traced
        outputs, pull = jax.vjp(lambda *x: run(op, x, segment_ids, name, chunk_size), *inputs)
        return *outputs, *pull(cotangents)


def assert_close(op, got, expected):
    """Compares outputs and gradients with the limits of their dtype."""
    most, decay = LIMITS[str(got[0].dtype)]
    names = ("o", "state", *("d" + name for name in NAMES[op]))
    errors = {name: error(*pair) for name, *pair in zip(names, got, expected, strict=True)}
    limits = {name: decay if name == "dg" else most for name in names}
    assert all(errors[name] <= limits[name] for name in names), errors
