"""The chunk's mathematics on values, without any kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.gated_delta_rule.gates import BORDER, decay_gradient, gate_rows
from kernels_pallas.gated_delta_rule.gradient_math import (
    PairProducts,
    StateProducts,
    add_state_products,
    pair_gradients,
    row_gradients,
)
from kernels_pallas.gated_delta_rule.kernel_math import (
    Gates,
    between,
    chunk_scores,
    unit_inverse,
    walk_back_chunk,
    walk_chunk,
)

CHUNK, PARTS, WIDTH = 64, (64, 32), 32
SCALE = 0.3


def relative(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)


def cut(rows):
    return tuple(jnp.split(rows, [PARTS[0]], axis=1))


def one_chunk_gates(g, beta):
    rows = gate_rows(g[None, :, None], beta[None, :, None], CHUNK)
    return rows, Gates(*(row[0, 0] for row in rows))


def inputs(seed=0):
    keys = jax.random.split(jax.random.key(seed), 8)
    q, k = (jax.random.normal(key, (CHUNK, sum(PARTS))) for key in keys[:2])
    v, do = (jax.random.normal(key, (CHUNK, WIDTH)) for key in keys[2:4])
    g, beta = -jax.random.uniform(keys[4], (CHUNK,)), jax.random.uniform(keys[5], (CHUNK,))
    state, dstate = (jax.random.normal(key, (sum(PARTS), WIDTH)) for key in keys[6:])
    return (q, k, v, g, beta, state), (do, dstate)


def recurrence(q, k, v, g, beta, state):
    """Token by token, rows normalised: o [C, V] and the state [K, V]."""
    q, k = (x / jnp.sqrt(jnp.sum(x * x, axis=1, keepdims=True) + 1e-6) for x in (q, k))

    def step(state, token):
        q, k, v, g, beta = token
        state = jnp.exp(g) * state
        state = state + jnp.outer(k, beta * (v - state.T @ k))
        return state, SCALE * state.T @ q

    with jax.default_matmul_precision("highest"):
        state, o = jax.lax.scan(step, state, (q, k, v, g, beta))
    return o, state


def similar_keys(cosine):
    rng = np.random.default_rng(0)
    common, own = rng.normal(size=(1, 96)), rng.normal(size=(CHUNK, 96))
    keys = np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


@pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 2e-6), ("bfloat16", 2e-4)])
def test_inverse(dtype, limit, cosine):
    """Powers of the matrix, the usual way, reach 1e9 here before they cancel."""
    keys = similar_keys(cosine)
    a = np.tril(keys @ keys.T, -1).astype(np.float32)
    exact = np.linalg.inv(np.eye(CHUNK) + a.astype(np.float64))
    assert relative(jax.jit(unit_inverse, static_argnums=1)(a, jnp.dtype(dtype)), exact) < limit


def test_decay_between_rows_keeps_small_decays_behind_large_ones():
    g = np.full(CHUNK, -1e-3, np.float32)
    g[20] = BORDER  # sums from here on are 120 larger
    _, gates = one_chunk_gates(jnp.asarray(g), jnp.ones(CHUNK))
    d = np.asarray(between(gates.coarse, gates.fine))
    total = np.cumsum(g.astype(np.float64))
    exact = np.tril(np.exp(np.minimum(total[:, None] - total[None], 0)))
    assert np.all(d[20:, :20] == 0)  # a border passes nothing
    np.testing.assert_allclose(d, exact, rtol=3e-7, atol=1e-37)


def forward(q, k, v, g, beta, state):
    _, gates = one_chunk_gates(g, beta)
    q, k = cut(q), cut(k)
    scores = chunk_scores(q, k, gates, SCALE, True)
    decay = gates.from_start[:, -1:]
    after, news, o = walk_chunk(cut(state.T), q, k, v.T, scores, decay)
    return o.T, jnp.concatenate(after, axis=1).T, news


def test_one_chunk_is_the_recurrence():
    arguments, _ = inputs()
    o, state, _ = jax.jit(forward)(*arguments)
    want_o, want_state = jax.jit(recurrence)(*arguments)
    assert relative(o, want_o) < 1e-6
    assert relative(state, want_state) < 1e-6


def backward(arguments, do, dstate):
    """All gradients of one chunk from the pieces that the kernels put together."""
    q, k, _, g, beta, state = arguments
    rows, gates = one_chunk_gates(g, beta)
    q, k = cut(q), cut(k)
    scores = chunk_scores(q, k, gates, SCALE, True)
    _, _, news = forward(*arguments)
    after = cut(dstate.T)
    before, dv = walk_back_chunk(after, q, k, do.T, scores, gates.from_start[:, -1:])
    dv, news = dv.T, news.T
    pair = pair_gradients(PairProducts(do @ news.T, dv @ news.T), q, k, gates, SCALE, True)
    zeros = tuple(jnp.zeros((CHUNK, width)) for width in PARTS)
    sums = StateProducts(zeros, zeros, zeros)
    for columns in (slice(0, 16), slice(16, WIDTH)):  # as the kernel goes over V
        sums = add_state_products(
            sums,
            tuple(x[columns] for x in cut(state.T)),
            tuple(x[columns] for x in after),
            do[:, columns],
            dv[:, columns],
            news[:, columns],
        )
    out = row_gradients(sums, pair, q, k, gates, SCALE, True)
    inner = jnp.sum(state * dstate).reshape(1, 1, 1)
    lift = lambda x: x[None, None]  # noqa: E731
    dg = decay_gradient(rows, lift(pair.decay), lift(out.from_start), lift(out.to_write), inner)
    return {
        "q": jnp.concatenate(out.q, axis=1),
        "k": jnp.concatenate(out.k, axis=1),
        "v": dv,
        "g": dg[0, 0, 0],
        "beta": pair.own[0] / beta,
        "beta, summed": (pair.beta + out.to_write)[0],
        "state": jnp.concatenate(before, axis=1).T,
    }


def test_gradients_of_one_chunk():
    arguments, (do, dstate) = inputs()
    with jax.default_matmul_precision("highest"):
        got = jax.jit(backward)(arguments, do, dstate)
        _, pull = jax.vjp(recurrence, *arguments)
        expected = dict(zip(("q", "k", "v", "g", "beta", "state"), pull((do, dstate)), strict=True))
    expected["beta, summed"] = expected["beta"]  # what stands in where beta is 0
    for name, value in got.items():
        assert relative(value, np.asarray(expected[name], np.float64)) < 3e-6, name
