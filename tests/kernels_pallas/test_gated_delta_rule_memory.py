"""What the gated delta rule keeps for its backward pass, and for how long states live."""

import jax
import jax.numpy as jnp
import pytest
from gated_delta_inputs import SIZES, make

from kernels_pallas import backend, gated_delta_rule


def intermediates(jaxpr):
    """Yields every array that a jaxpr computes, those inside kernels left out."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        if equation.primitive.name == "pallas_call":
            continue
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def rule(implementation, chunk_size=16):
    def run(q, k, v, g, beta, state):
        return gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            use_qk_l2norm=True,
            chunk_size=chunk_size,
            implementation=implementation,
        )

    return run


def kept(function, inputs):
    """Returns the shapes of the arrays that the derivative of a function holds on to."""
    found = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(function, *x)[1], *inputs))
    return [x for x in found if x.ndim]


def test_no_state_a_token_is_kept_or_computed():
    inputs, cotangents = make(sizes=(3, 50, 2, 4, 8, 12))
    batch, length, heads, width = inputs[2].shape
    states = batch * length * heads * inputs[0].shape[-1] * width

    def measure(implementation):
        run = rule(implementation)
        both = jax.make_jaxpr(lambda x, c: jax.vjp(run, *x)[1](c))(inputs, cotangents)
        largest = max(aval.size for aval in intermediates(both.jaxpr))
        return sum(x.size for x in kept(run, inputs)), largest

    inverse = batch * (length + -length % 16) * heads * 16
    total, largest = measure("xla")
    assert total <= sum(x.size for x in inputs) + inverse
    assert largest < states
    total, largest = measure("reference")  # which does: the measure sees it
    assert total > states and largest >= states


def shapes(b, t, h, hv, k, v, dtype):
    struct = jax.ShapeDtypeStruct
    q, row = struct((b, t, h, k), dtype), struct((b, t, hv), jnp.float32)
    return q, q, struct((b, t, hv, v), dtype), row, row, struct((b, hv, k, v), jnp.float32)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((8, 8192, 12, 12, 96, 256), jnp.bfloat16),
        ((8, 8192, 8, 16, 128, 256), jnp.bfloat16),
        ((8, 8192, 6, 12, 96, 256), jnp.float32),
    ],
)
def test_kernels_keep_their_inputs_and_the_inverse(sizes, dtype, platform):
    b, t, h, hv, k, v = sizes
    with backend.compile_for(platform):
        found = kept(rule("pallas", 64), shapes(*sizes, dtype))
    size = jnp.dtype(dtype).itemsize
    a_token = size * (2 * h * k + hv * v) + 4 * 2 * hv + size * 64 * hv
    state = 4 * b * hv * k * v
    assert sum(x.size * x.dtype.itemsize for x in found) == b * t * a_token + state


def test_kernels_keep_little_more_where_t_is_cut():
    """A state and a transition for each of the segments that walk side by side."""
    b, t, h, hv, k, v = sizes = (1, 65536, 12, 12, 96, 256)
    with backend.compile_for("gpu"):
        found = kept(rule("pallas", 64), shapes(*sizes, jnp.bfloat16))
    a_token = 2 * (2 * h * k + hv * v) + 4 * 2 * hv + 2 * 64 * hv
    more = sum(x.size * x.dtype.itemsize for x in found) - t * a_token
    assert 0 < more < 0.05 * t * a_token


def test_kernels_compute_one_state_a_chunk():
    b, t, _, hv, k, v = sizes = (8, 8192, 12, 12, 96, 256)
    inputs = shapes(*sizes, jnp.bfloat16)
    cotangents = inputs[2], inputs[5]
    with backend.compile_for("gpu"):
        run = rule("pallas", 64)
        both = jax.make_jaxpr(lambda x, c: jax.vjp(run, *x)[1](c))(inputs, cotangents)
    assert max(aval.size for aval in intermediates(both.jaxpr)) == b * t // 64 * hv * k * v


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_remat_policy_can_keep_the_inverse(implementation):
    inputs, _ = make(sizes=SIZES["pallas"])
    keep = jax.checkpoint_policies.save_only_these_names("gated_delta_rule_inverse")

    def total(policy):
        run = jax.checkpoint(rule(implementation, 64), policy=policy)
        return sum(x.size for x in kept(run, inputs))

    nothing = jax.checkpoint_policies.nothing_saveable
    batch, length, heads, _ = inputs[2].shape
    assert total(keep) - total(nothing) == batch * (length + -length % 64) * heads * 64
