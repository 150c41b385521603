"""Inputs of linear attention's tests, its recurrence in float64 NumPy and the call under test."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
from gated_delta_inputs import error, platform_of

from kernels_pallas import linear_attention

# B T H HV K V, as small as each implementation takes; T is no multiple of any chunk.
SIZES = dict.fromkeys(("reference", "xla"), (3, 150, 2, 4, 8, 12))
SIZES |= dict.fromkeys(("pallas", "pallas for a TPU"), (3, 150, 1, 2, 64, 64))
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dinitial_state")
# Decays: one a head or one a key channel, and the range of -g, log-uniform; or all the same.
DECAYS = {
    "one a head": ("head", 1e-3, 0.5),
    "one a head, none": ("head", 0.0, 0.0),
    "one a head, strong": ("head", 100.0, 100.0),
    "one a head, of every size": ("head", 1e-5, 100.0),
    "one a channel": ("channel", 1e-3, 0.5),
    "one a channel, none": ("channel", 0.0, 0.0),
    "one a channel, strong": ("channel", 100.0, 100.0),
    "one a channel, of every size": ("channel", 1e-5, 100.0),
    "slow channels beside fast ones": ("slow and fast", 1e-5, 100.0),
}


def make(decay, dtype=jnp.float32, sizes=SIZES["xla"]):
    """Returns inputs q, k, v, g, state and the cotangents of o and the state."""
    rng = np.random.default_rng(0)
    b, t, h, hv, k, v = sizes
    kind, low, high = DECAYS[decay]
    shape = (b, t, hv) if kind == "head" else (b, t, hv, k)
    if kind == "slow and fast":  # every channel keeps its own size
        g = -np.geomspace(low, high, k) * rng.uniform(0.5, 1, shape)
    elif low == high:
        g = np.full(shape, -low)
    else:
        g = -np.exp(rng.uniform(np.log(low), np.log(high), shape))
    q, key, value, do = (
        rng.normal(size=s) for s in ((b, t, h, k), (b, t, h, k), (b, t, hv, v), (b, t, hv, v))
    )
    state, dstate = rng.normal(size=(2, b, hv, k, v))
    q, key, value, do = (jnp.asarray(x, dtype) for x in (q, key, value, do))
    g, state, dstate = (jnp.asarray(x, jnp.float32) for x in (g, state, dstate))
    return (q, key, value, g, state), (do, dstate)


def _document(q, k, v, g, state, do, dstate):
    """Runs one head of one document, forward and backward; g is [T, K]."""
    states, o = [state], np.zeros_like(v)
    for t in range(len(v)):
        states.append(np.exp(g[t])[:, None] * states[-1] + np.outer(k[t], v[t]))
        o[t] = states[-1].T @ q[t]
    dq, dk, dv, dg = (np.zeros_like(x) for x in (q, k, v, g))
    for t in reversed(range(len(v))):
        dq[t] = states[t + 1] @ do[t]
        dstate = dstate + np.outer(q[t], do[t])
        dk[t], dv[t] = dstate @ v[t], dstate.T @ k[t]
        dstate = np.exp(g[t])[:, None] * dstate
        dg[t] = (dstate * states[t]).sum(1)
    return o, states[-1], dq, dk, dv, dg, dstate


def recurrence(inputs, segment_ids, cotangents, scale=None):
    """Returns o, the state and the gradients of q, k, v, g and the initial state."""
    q, k, v, g, initial = (np.asarray(x, np.float64) for x in inputs)
    do, dlast = (np.asarray(x, np.float64) for x in cotangents)
    heads, width = q.shape[2:]
    repeats = v.shape[2] // heads
    scale = width**-0.5 if scale is None else scale
    decay = np.broadcast_to(g if g.ndim == 4 else g[..., None], (*v.shape[:3], width))
    if segment_ids is None:
        segment_ids = np.ones(v.shape[:2], np.int32)
    o, state, dinitial = np.zeros_like(v), initial.copy(), np.zeros_like(initial)
    dq, dk, dv, dg = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(decay.shape)
    for b in range(len(q)):
        documents = oracle.runs(segment_ids[b])
        if not documents:
            dinitial[b] = dlast[b]
        for index, (start, stop) in enumerate(documents):
            at, is_last = slice(start, stop), index == len(documents) - 1
            for j in range(v.shape[2]):
                h = j // repeats
                before = initial[b, j] * (index == 0)
                found = _document(
                    *(scale * q[b, at, h], k[b, at, h], v[b, at, j], decay[b, at, j]),
                    *(before, do[b, at, j], dlast[b, j] * is_last),
                )
                o[b, at, j], state[b, j] = found[:2]
                dq[b, at, h] += scale * found[2]
                dk[b, at, h] += found[3]
                dv[b, at, j], dg[b, at, j] = found[4:6]
                if index == 0:
                    dinitial[b, j] = found[6]
    return o, state, dq, dk, dv, dg if g.ndim == 4 else dg.sum(3), dinitial


def run(q, k, v, g, state, segment_ids, implementation, chunk_size=None):
    return linear_attention(
        *(q, k, v, g),
        initial_state=state,
        segment_ids=segment_ids,
        state_dtype=state.dtype,
        chunk_size=chunk_size or (64 if implementation == "pallas" else 16),
        implementation=implementation,
    )


@functools.partial(jax.jit, static_argnames=("implementation",))
def forward(inputs, segment_ids, implementation):
    """Returns o and the state."""
    return run(*inputs, segment_ids, implementation)


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def outputs_and_gradients(inputs, segment_ids, cotangents, implementation, chunk_size=None):
    """Returns o, the state and the gradients of all inputs."""
    name, interpreter = platform_of(implementation)
    with interpreter:  # also while the backward pass is traced
        outputs, pull = jax.vjp(lambda *x: run(*x, segment_ids, name, chunk_size), *inputs)
        return *outputs, *pull(cotangents)


def assert_close(got, expected):
    """Compares outputs and gradients with the limits of their dtype."""
    limits = oracle.LIMITS[str(got[0].dtype)]
    errors = {name: error(*pair) for name, *pair in zip(NAMES, got, expected, strict=True)}
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in got)
    assert all(errors[name] <= limits[name] for name in NAMES), errors
