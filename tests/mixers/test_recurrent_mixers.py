"""Every recurrent mixer: packed rows, chunks and steps give what each document gives alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrent_cases import SMALL, WIDTH, make, random, relative

from jet_jax.cache import RecurrentState
from jet_jax.mixers.context import Context
from jet_jax.params import flatten
from kernels_pallas import segment_positions

# (row, first column, length): neighbours, and padding before, between and after.
DOCUMENTS = [(0, 0, 9), (0, 9, 7), (0, 16, 4), (1, 3, 10), (1, 15, 2)]
ROWS, LENGTH = len(DOCUMENTS), 20
CASES = [(kind, True) for kind in SMALL] + [("rwkv7", False)]
TOLERANCE = 3e-6


@dataclasses.dataclass
class Case:
    """A mixer, its input in both layouts, and what it gives for the documents alone."""

    kind: str
    options: object
    graphdef: object
    params: dict
    packed: dict
    alone: dict


def layouts(first):
    """Inputs, factors of the loss and segment ids, packed and with a row for each document."""
    packed = {
        "x": 3.0 * random(5, ROWS, LENGTH, WIDTH),  # padding is not zero
        "r": jnp.zeros((ROWS, LENGTH, WIDTH)),
        "v_first": random(7, ROWS, LENGTH, WIDTH),
        "segment_ids": jnp.zeros((ROWS, LENGTH), jnp.int32),
    }
    alone = {name: array[::-1] for name, array in packed.items()}
    factors = random(6, ROWS, LENGTH, WIDTH)
    for i, (row, start, length) in enumerate(DOCUMENTS):
        here, there = (row, slice(start, start + length)), (i, slice(0, length))
        packed["r"] = packed["r"].at[here].set(factors[there])
        packed["segment_ids"] = packed["segment_ids"].at[here].set(i + 1)
        for name in packed:
            alone[name] = alone[name].at[there].set(packed[name][here])
    if first:
        del packed["v_first"], alone["v_first"]
    return packed, alone


def shared(arrays):
    return {"v_first": arrays["v_first"]} if "v_first" in arrays else {}


@pytest.fixture(scope="module", params=CASES, ids=[f"{k}{'' if f else '-later'}" for k, f in CASES])
def case(request):
    kind, first = request.param
    config, graphdef, params = make(kind, SMALL[kind], first)
    return Case(kind, config.options(kind), graphdef, params, *layouts(first))


@pytest.fixture(scope="module")
def whole(case):
    """Outputs and gradients of the packed rows and of the documents alone, one program for both."""

    @jax.jit
    def run(params, x, arrays):
        ctx = Context(
            arrays["segment_ids"],
            segment_positions(arrays["segment_ids"]),
            None,
            shared(arrays),
        )

        def loss(params, x):
            y, state, _ = nnx.merge(case.graphdef, params)(x, ctx)
            assert state is None
            return jnp.sum(y * arrays["r"]), y

        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return y, *gradients

    return [run(case.params, arrays.pop("x"), arrays) for arrays in map(dict, both(case))]


def both(case):
    return case.packed, case.alone


def test_packed_rows_equal_documents_alone(whole):
    (y, of_params, of_x), (y_alone, of_params_alone, of_x_alone) = whole
    assert np.isfinite(y).all()  # at the padding too
    for i, (row, start, length) in enumerate(DOCUMENTS):
        here, there = (row, slice(start, start + length)), (i, slice(0, length))
        assert relative(y[here], y_alone[there]) < TOLERANCE, i
        assert relative(of_x[here], of_x_alone[there]) < 3 * TOLERANCE, i
    expected = flatten(of_params_alone)
    for name, value in flatten(of_params).items():
        assert np.isfinite(value).all() and np.linalg.norm(expected[name]) > 0, name
        assert relative(value, expected[name]) < 1e-5, name


def test_padding_gets_no_gradient(case, whole):
    """Nothing leaks out of a segment: where no document stands x has no influence."""
    of_x = np.asarray(whole[0][2])
    assert not of_x[np.asarray(case.packed["segment_ids"]) == 0].any()


@pytest.fixture(scope="module")
def states(case, whole):
    """Feeds the documents row by row in two padded chunks and then in steps.

    Returns the states after each call and the outputs by document.
    """

    @jax.jit
    def run(params, x, segment_ids, seen, arrays, state):
        positions = seen[:, None] + jnp.cumsum(segment_ids, axis=1) - 1
        ctx = Context(segment_ids, positions, seen, arrays)
        y, state, _ = nnx.merge(case.graphdef, params)(x, ctx, state)
        return y, state

    rows = np.arange(ROWS)[:, None]
    seen = np.zeros(ROWS, np.int32)
    lengths = np.array([length for *_, length in DOCUMENTS])
    state = RecurrentState.init(case.options, WIDTH, ROWS, 0, jnp.float32, jnp.float32)
    trace, outputs = [(seen, state)], [[] for _ in DOCUMENTS]
    for width, real in ((5, (5, 3, 0, 4, 1)), (5, (4, 0, 4, 5, 1)), (1, (0, 1, 0, 1, 0))) + (
        (1, (0, 1, 0, 0, 0)),
    ) * 3:
        at = np.minimum(seen[:, None] + np.arange(width), LENGTH - 1)
        segment_ids = (np.arange(width) < np.array(real)[:, None]).astype(np.int32)
        arrays = {name: array[rows, at] for name, array in shared(case.alone).items()}
        x = case.alone["x"][rows, at]
        y, state = run(case.params, x, segment_ids, seen, arrays, state)
        for i, count in enumerate(real):
            outputs[i].append(y[i, :count])
        seen = seen + np.array(real, np.int32)
        trace.append((seen, state))
    np.testing.assert_array_equal(seen, lengths)
    return trace, [jnp.concatenate(parts) for parts in outputs]


def test_chunks_and_steps_equal_the_whole(whole, states):
    y = whole[1][0]
    for i, output in enumerate(states[1]):
        assert relative(output, y[i, : len(output)]) < 2 * TOLERANCE, i


def test_padding_leaves_a_state_untouched(states):
    """Rows without a real token keep every bit, in chunks and in steps."""
    trace = states[0]
    untouched = 0
    for (before, old), (after, new) in zip(trace, trace[1:], strict=False):
        for row in np.flatnonzero(before == after):
            untouched += 1
            for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
                np.testing.assert_array_equal(a[row], b[row])
    assert untouched > 10
