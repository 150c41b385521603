"""Greedy, temperature, top-k and top-p against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jet_jax.sampling import filter_logits, keep_top_p, make_sampling, sample

E = 1000
filtered = jax.jit(filter_logits)


@pytest.fixture(scope="module")
def logits():
    return np.random.default_rng(0).normal(0, 3, (4, E)).astype(np.float32)


def softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def expected_kept(row, temperature, top_k, top_p):
    """The kept ids of one row by sorting, in float64."""
    p = softmax(row / temperature)
    order = np.argsort(-p)[: top_k or E]
    p = p / p[order].sum()
    if top_p is not None:
        order = order[: np.searchsorted(np.cumsum(p[order]), top_p) + 1]
    return set(order.tolist())


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, None), (1, None), (None, 0.9), (None, 0.01), (40, 0.8), (None, None)]
)
def test_kept_tokens_equal_those_of_a_sort(logits, temperature, top_k, top_p):
    out = np.asarray(filtered(logits, make_sampling(E, temperature, top_k, top_p)))
    for row, kept in zip(logits, out, strict=True):
        expected = expected_kept(row, temperature, top_k, top_p)
        assert set(np.flatnonzero(np.isfinite(kept)).tolist()) == expected
        ids = sorted(expected)
        # What is kept keeps its relative probabilities.
        np.testing.assert_allclose(softmax(kept[ids]), softmax(row[ids] / temperature), rtol=2e-5)


def test_ties_at_the_threshold_stay():
    row = jnp.log(jnp.asarray([[0.4, 0.2, 0.2, 0.1, 0.1]], jnp.float32))
    kept = lambda x: np.flatnonzero(np.isfinite(np.asarray(x)[0])).tolist()  # noqa: E731
    assert kept(keep_top_p(row, jnp.float32(0.45))) == [0, 1, 2]
    assert kept(keep_top_p(row, jnp.float32(0.3))) == [0]
    assert kept(filtered(row, make_sampling(5, 1.0, top_k=2))) == [0, 1, 2]


def test_samples_follow_the_distribution():
    """20,000 draws: each frequency within five standard errors of its probability."""
    n, p = 20_000, np.asarray([0.5, 0.25, 0.15, 0.07, 0.03])
    rows = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (n, 5))
    key, zeros = jax.random.key(1), jnp.zeros(n, jnp.int32)
    sampling = make_sampling(5, 2.0, top_k=4)
    tokens = np.asarray(jax.jit(sample)(rows, key, zeros, jnp.arange(n), sampling))
    expected = np.sqrt(p) * (p > 0.05)
    expected /= expected.sum()
    seen = np.bincount(tokens, minlength=5) / n
    assert seen[4] == 0
    assert np.all(np.abs(seen - expected) <= 5 * np.sqrt(expected * (1 - expected) / n))


def test_a_row_depends_on_its_request_and_position_only(logits):
    key, sampling = jax.random.key(3), make_sampling(E, 5.0)
    rows = jnp.asarray(np.repeat(logits[:1], 64, 0))
    requests, positions = jnp.arange(64) % 8, jnp.arange(64) // 8
    draw = jax.jit(sample)
    batch = np.asarray(draw(rows, key, requests, positions, sampling))
    assert len(set(batch.tolist())) > 32  # requests and positions draw apart
    order = np.random.default_rng(0).permutation(64)
    again = np.asarray(draw(rows, key, requests[order], positions[order], sampling))
    np.testing.assert_array_equal(again, batch[order])
    other = np.asarray(draw(rows, jax.random.key(4), requests, positions, sampling))
    assert (other != batch).any()


def test_limits_of_temperature(logits):
    args = (jax.random.key(0), jnp.arange(4), jnp.arange(4))
    best = logits.argmax(1)
    for temperature in (0.0, 1e-30):
        np.testing.assert_array_equal(
            sample(jnp.asarray(logits), *args, make_sampling(E, temperature)), best
        )


def test_numbers_are_traced(logits):
    """Other temperatures, top_p and top_k (up to the same power of two) compile nothing."""
    count = filtered._cache_size()
    filtered(logits, make_sampling(E, 0.31, 33, 0.52))
    first = filtered._cache_size()
    filtered(logits, make_sampling(E, 0.83, 64, 0.91))
    assert first <= count + 1 and filtered._cache_size() == first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be an integer >= 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.2}, r"top_p=1.2 must lie in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": float("nan")}, "top_p=nan"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sampling(E, **arguments)


def test_what_keeps_everything_costs_nothing():
    sampling = make_sampling(E, 1.0, top_k=5000, top_p=1.0)
    assert sampling.most_k == 0 and not sampling.uses_top_p
    assert make_sampling(E, 0.0, top_k=5, top_p=0.5).is_greedy
