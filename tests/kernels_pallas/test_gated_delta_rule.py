"""One suite over the implementations of the gated delta rule, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest

from kernels_pallas import gated_delta_rule, gated_delta_step
from kernels_pallas.gated_delta_rule.chunk_math import unit_lower_inverse

IMPLEMENTATIONS = ["reference", "xla"]
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state")
# Relative Frobenius error. float32: rounding times the condition of the recurrence; a decay's
# gradient is a sum of terms that partly cancel. bfloat16: the rounding of operands and results.
FLOAT32 = dict.fromkeys(NAMES, 3e-6) | {"o": 2e-6, "state": 2e-6, "dinitial_state": 2e-6}
FLOAT32["dg"] = 2e-5
BFLOAT16 = dict.fromkeys(NAMES, 8e-3) | {"dg": 1e-2}
CASES = {
    "plain": {},
    "no decay, beta 1, keys alike": dict(decay=(0.0, 0.0), beta=1.0, alike=0.9),
    "strong decay": dict(decay=(20.0, 20.0)),
    "weak beside strong decay": dict(decay=(1e-5, 100.0)),
    "keys alike": dict(beta=0.95, alike=0.9),
}
# Leading padding, a document of one token, inner padding, borders off the chunk grid; a document
# over the whole row; nothing but padding.
ROWS = [(0, 5), (1, 11), (2, 1), (3, 17), (0, 3), (4, 9), (0, 4)], [(7, 50)], [(0, 50)]
SEGMENTS = np.array([np.repeat(*zip(*row, strict=True)) for row in ROWS], np.int32)


def make(dtype=jnp.float32, sizes=(3, 50, 2, 4, 8, 12), decay=(1e-3, 0.5), beta=None, alike=0.0):
    """Returns inputs and cotangents; SiLU leaves keys with a common direction."""
    rng = np.random.default_rng(0)
    b, t, h, hv, k, v = sizes
    keys = alike * np.abs(rng.normal(size=k)) + (1 - alike) * rng.normal(size=(b, t, h, k))
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


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size"))
def outputs_and_gradients(inputs, segment_ids, cotangents, implementation, chunk_size=16):
    def run(q, k, v, g, beta, state):
        return gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            segment_ids=segment_ids,
            use_qk_l2norm=True,
            chunk_size=chunk_size,
            implementation=implementation,
        )

    outputs, pull = jax.vjp(run, *inputs)
    return *outputs, *pull(cotangents)


@functools.partial(jax.jit, static_argnames=("implementation",))
def forward(inputs, segment_ids, implementation):
    q, k, v, g, beta, state = inputs
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        segment_ids=segment_ids,
        use_qk_l2norm=True,
        chunk_size=16,
        implementation=implementation,
    )


def error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def assert_close(got, expected, limits):
    errors = {name: error(*pair) for name, *pair in zip(NAMES, got, expected, strict=True)}
    assert all(errors[name] <= limits[name] for name in NAMES), errors


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matches_the_recurrence_in_float64(implementation, case):
    inputs, cotangents = make(**CASES[case])
    got = outputs_and_gradients(inputs, None, cotangents, implementation)
    assert_close(got, oracle.gated_delta_rule(inputs, None, cotangents), FLOAT32)


@pytest.mark.parametrize("case", ["plain", "keys alike"])
def test_bfloat16_stays_within_its_rounding(case):
    inputs, cotangents = make(jnp.bfloat16, **CASES[case])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, "xla")
    assert_close(got, oracle.gated_delta_rule(inputs, SEGMENTS, cotangents), BFLOAT16)
    assert got[0].dtype == got[2].dtype == jnp.bfloat16
    assert got[1].dtype == got[5].dtype == jnp.float32


@pytest.mark.parametrize("case", ["plain", "strong decay"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_and_padded_rows_equal_their_documents_alone(implementation, case):
    inputs, cotangents = make(**CASES[case])
    got = outputs_and_gradients(inputs, SEGMENTS, cotangents, implementation)
    assert_close(got, oracle.gated_delta_rule(inputs, SEGMENTS, cotangents), FLOAT32)
    for x in (got[0], *got[2:7]):
        assert not np.asarray(x)[SEGMENTS == 0].any()
    np.testing.assert_array_equal(got[1][2], inputs[5][2])


def test_default_chunk_with_a_ragged_end_and_borders_inside():
    sizes = (1, 150, 1, 2, 16, 8)
    inputs, cotangents = make(sizes=sizes, alike=0.5)
    segments = np.repeat([[1, 2, 3, 4, 0]], [70, 1, 10, 60, 9], axis=1).astype(np.int32)
    got = outputs_and_gradients(inputs, segments, cotangents, "xla", chunk_size=64)
    assert_close(got, oracle.gated_delta_rule(inputs, segments, cotangents), FLOAT32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_state_is_handed_over_at_any_split(implementation):
    inputs, _ = make()
    whole, state = forward(inputs, np.ones((3, 50), np.int32), implementation)
    for split in (1, 15, 16, 17, 33, 49):
        is_left = np.broadcast_to(np.arange(50) < split, (3, 50)).astype(np.int32)
        left, middle = forward(inputs, is_left, implementation)
        right, last = forward((*inputs[:5], middle), 1 - is_left, implementation)
        assert error(left + right, whole) < 2e-6
        assert error(last, state) < 2e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_steps_equal_the_sequence(implementation):
    (q, k, v, g, beta, state), cotangents = make()
    expected = oracle.gated_delta_rule((q, k, v, g, beta, state), None, cotangents)

    @jax.jit
    def step(q, k, v, g, beta, state):
        return gated_delta_step(
            q, k, v, g, beta, state, use_qk_l2norm=True, implementation=implementation
        )

    outputs = []
    for t in range(q.shape[1]):
        o, state = step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state)
        outputs.append(o)
    assert error(np.stack(outputs, axis=1), expected[0]) < 2e-6
    assert error(state, expected[1]) < 2e-6

    small = state.astype(jnp.bfloat16)
    o, kept = step(q[:, 0], k[:, 0], v[:, 0], 0 * g[:, 0], 0 * beta[:, 0], small)
    assert o.dtype == jnp.float32 and kept.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept, small)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_defaults_no_decay_no_norm_own_scale(implementation):
    (q, k, v, g, beta, state), cotangents = make(alike=0.9)
    k = k / 3
    expected = oracle.gated_delta_rule(
        (q, k, v, 0 * g, beta, 0 * state), None, cotangents, scale=0.3, use_qk_l2norm=False
    )
    o, last = jax.jit(
        lambda *x: gated_delta_rule(
            *x, scale=0.3, state_dtype=jnp.bfloat16, implementation=implementation
        )
    )(q, k, v, None, beta)
    assert error(o, expected[0]) < 2e-6
    assert last.dtype == jnp.bfloat16 and error(last, expected[1]) < 4e-3
    zeros = jnp.zeros_like(state)
    options = dict(scale=0.3, implementation=implementation)
    o, _ = gated_delta_step(q[:, 0], k[:, 0], v[:, 0], None, beta[:, 0], zeros, **options)
    assert error(o, expected[0][:, 0]) < 2e-6


@pytest.mark.parametrize("size", [16, 64, 256])
def test_inverse_holds_where_keys_are_equal(size):
    a = np.tril(np.ones((2, size, size)), -1) * np.array([1.0, 0.9])[:, None, None]
    got = unit_lower_inverse(jnp.asarray(a, jnp.float32))
    assert error(got, np.linalg.inv(np.eye(size) + a)) < 1e-6


def intermediates(jaxpr):
    """Yields every array that a jaxpr computes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def test_no_state_a_token_is_kept_or_computed():
    inputs, cotangents = make()
    batch, length, heads, width = inputs[2].shape
    states = batch * length * heads * inputs[0].shape[-1] * width

    def kept(implementation):
        def run(*x):
            return gated_delta_rule(
                *x[:5], initial_state=x[5], chunk_size=16, implementation=implementation
            )

        def pull(*x):
            return jax.vjp(run, *x)[1]

        largest = max(
            aval.size
            for aval in intermediates(
                jax.make_jaxpr(lambda x, c: jax.vjp(run, *x)[1](c))(inputs, cotangents).jaxpr
            )
        )
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(pull, *inputs))), largest

    inverse = batch * (length + -length % 16) * heads * 16
    total, largest = kept("xla")
    assert total <= sum(x.size for x in inputs) + inverse
    assert largest < states
    total, largest = kept("reference")  # which does: the measure sees it
    assert total > states and largest >= states


def test_remat_policy_can_keep_the_inverse():
    inputs, _ = make()
    keep = jax.checkpoint_policies.save_only_these_names("gated_delta_rule_inverse")

    def pull(policy):
        run = jax.checkpoint(
            lambda *x: gated_delta_rule(*x[:5], chunk_size=16, implementation="xla"), policy=policy
        )
        kept = jax.eval_shape(lambda *x: jax.vjp(run, *x)[1], *inputs)
        return sum(x.size for x in jax.tree.leaves(kept))

    everything = jax.checkpoint_policies.nothing_saveable
    assert pull(keep) - pull(everything) == 3 * 64 * 4 * 16


SMALL = dict(
    q=np.zeros((2, 5, 2, 4), np.float32),
    k=np.zeros((2, 5, 2, 4), np.float32),
    v=np.zeros((2, 5, 4, 6), np.float32),
    g=np.zeros((2, 5, 4), np.float32),
    beta=np.zeros((2, 5, 4), np.float32),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(q=np.zeros((2, 5, 4), np.float32)),
            r"q has shape \(2, 5, 4\), expected \[B, T, H, K\]",
        ),
        (
            dict(k=np.zeros((2, 6, 2, 4), np.float32)),
            "k has shape .* expected .*B=2, T=5, H=2, K=4",
        ),
        (dict(v=np.zeros((2, 5, 4, 6), np.int32)), "v has dtype int32"),
        (dict(v=np.zeros((2, 5, 4, 6), np.float16)), "expected one dtype, got q float32"),
        (dict(g=np.zeros((2, 5, 2), np.float32)), "g has shape .* expected .*HV=4"),
        (dict(beta=np.zeros((2, 5), np.float32)), "beta has shape"),
        (
            dict(initial_state=np.zeros((2, 4, 6, 4), np.float32)),
            "initial_state has shape .*K=4, V=6",
        ),
        (dict(segment_ids=np.zeros((2, 4), np.int32)), r"segment_ids has shape \(2, 4\)"),
        (dict(segment_ids=np.zeros((2, 5), np.float32)), "segment_ids has dtype float32"),
        (dict(chunk_size=48), "chunk_size=48"),
        (dict(state_dtype=jnp.int32), "state_dtype="),
        (dict(implementation="cuda"), "'cuda' is unknown; use one of 'pallas', 'xla', 'reference'"),
        ({n: np.zeros((2, 5, 3, 4), np.float32) for n in "qk"}, "HV=4 .* H=3: .* multiple of H"),
        ({n: x[:, :0] for n, x in SMALL.items()}, "T=0 tokens"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**SMALL | change)


def test_bad_step_input_is_refused_by_name():
    inputs = {name: x[:, 0] for name, x in SMALL.items()}
    with pytest.raises(ValueError, match=r"state has shape \(2, 4, 6, 4\), expected .*K=4, V=6"):
        gated_delta_step(**inputs, state=np.zeros((2, 4, 6, 4), np.float32))
    with pytest.raises(ValueError, match=r"q has shape .*expected \[B, H, K\]"):
        gated_delta_step(**SMALL, state=np.zeros((2, 4, 4, 6), np.float32))


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
def test_splitting_t_over_devices_is_refused_with_the_reason(implementation):
    with pytest.raises(NotImplementedError, match="axis_name"):
        gated_delta_rule(**SMALL, axis_name="data", implementation=implementation)
