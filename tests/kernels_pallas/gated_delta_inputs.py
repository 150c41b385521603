"""Inputs of the gated delta rule's tests, the call under test and the measure of its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from kernel_oracles import LIMITS, NAMES

from kernels_pallas import backend, gated_delta_rule

# B T H HV K V, as small as each implementation takes; T is no multiple of any chunk.
SIZES = dict.fromkeys(("reference", "xla"), (3, 150, 2, 4, 8, 12))
SIZES |= dict.fromkeys(("pallas", "pallas for a TPU"), (3, 150, 1, 2, 64, 64))
CASES = {
    "plain": {},
    "no decay, beta 1, keys alike": dict(decay=(0.0, 0.0), beta=1.0, alike=0.9),
    "strong decay": dict(decay=(20.0, 20.0)),
    "weak beside strong decay": dict(decay=(1e-5, 100.0)),
    "keys alike": dict(beta=0.95, alike=0.9),
}
# Leading padding, a document of one token, inner padding, borders off and on the chunk grid; a
# document over the whole row; nothing but padding.
ROWS = [(0, 15), (1, 33), (2, 1), (3, 79), (0, 3), (4, 9), (0, 10)], [(7, 150)], [(0, 150)]
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)


def make(dtype=jnp.float32, sizes=SIZES["xla"], decay=(1e-3, 0.5), beta=None, alike=0.0):
    """Returns inputs and cotangents.

    Args:
      dtype: of q, k, v and o.
      sizes: B, T, H, HV, K and V.
      decay: range of -g, log-uniform; all the same where both ends are equal.
      beta: writing strength; None draws them.
      alike: mean cosine of two keys, which SiLU makes positive.
    """
    rng = np.random.default_rng(0)
    b, t, h, hv, k, v = sizes
    common = np.abs(rng.normal(size=k)) * alike**0.5
    keys = common + rng.normal(size=(b, t, h, k)) * (1 - alike) ** 0.5
    low, high = decay
    if low == high:
        g = np.full((b, t, hv), -low)
    else:
        g = -np.exp(rng.uniform(np.log(low), np.log(high), size=(b, t, hv)))
    strength = 1 / (1 + np.exp(-rng.normal(size=(b, t, hv))))
    strength = strength if beta is None else np.full_like(strength, beta)
    q, value, do = (rng.normal(size=s) for s in ((b, t, h, k), (b, t, hv, v), (b, t, hv, v)))
    state, dstate = 0.1 * rng.normal(size=(2, b, hv, k, v))
    wide = [jnp.asarray(x, dtype) for x in (q, keys, value, do)]
    g, strength, state, dstate = (jnp.asarray(x, jnp.float32) for x in (g, strength, state, dstate))
    return (*wide[:3], g, strength, state), (wide[3], dstate)


def platform_of(implementation):
    """Takes "pallas for a TPU" apart: the name, and the interpreter of a TPU's kernels."""
    name, _, platform = implementation.partition(" for a ")
    return name, backend.compile_for(platform.lower() or "cpu", interpret=True)


def _run(q, k, v, g, beta, state, segment_ids, implementation, chunk_size=None):
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        segment_ids=segment_ids,
        use_qk_l2norm=True,
        chunk_size=chunk_size or (64 if implementation == "pallas" else 16),
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames="implementation")
def forward(inputs, segment_ids, implementation):
    """Returns o and the state."""
    return _run(*inputs, segment_ids, implementation)


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def outputs_and_gradients(inputs, segment_ids, cotangents, implementation, chunk_size=None):
    """Returns o, the state and the gradients of all inputs."""
    name, interpreter = platform_of(implementation)
    with interpreter:  # also while the backward pass is traced
        outputs, pull = jax.vjp(lambda *x: _run(*x, segment_ids, name, chunk_size), *inputs)
        return *outputs, *pull(cotangents)


def error(got, expected):
    """Relative Frobenius error."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_close(got, expected):
    """Compares outputs and gradients with the limits of their dtype."""
    limits = LIMITS[str(got[0].dtype)]
    errors = {name: error(*pair) for name, *pair in zip(NAMES, got, expected, strict=True)}
    assert all(errors[name] <= limits[name] for name in NAMES), errors
