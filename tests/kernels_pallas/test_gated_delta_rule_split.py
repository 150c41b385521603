"""T cut into segments on one device, and split over devices: equal to the whole, gradients too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kernels_pallas import gated_delta_rule
from kernels_pallas.gated_delta_rule import pallas
from kernels_pallas.gated_delta_rule.segmented import count_segments

TOLERANCE = 3e-6  # float32
BATCH, HEADS, VALUE_HEADS, KEY_WIDTH, WIDTH = 2, 1, 2, 64, 64


def make(length, with_segments):
    keys = jax.random.split(jax.random.key(length), 8)
    rows = (BATCH, length, VALUE_HEADS)
    q, k = (jax.random.normal(key, (BATCH, length, HEADS, KEY_WIDTH)) for key in keys[:2])
    v, do = (jax.random.normal(key, (*rows, WIDTH)) for key in keys[2:4])
    g, beta = -(jax.random.uniform(keys[4], rows) ** 3), jax.random.uniform(keys[5], rows)
    shape = (BATCH, VALUE_HEADS, KEY_WIDTH, WIDTH)
    state, dstate = (jax.random.normal(key, shape) for key in keys[6:])
    segment_ids = None
    if with_segments:  # leading padding, borders inside, a gap, and segments over several parts
        segment_ids = np.zeros((BATCH, length), np.int32)
        segment_ids[:, 3 : length // 6] = 1
        segment_ids[:, length // 6 : length // 2] = 2
        segment_ids[0, length // 2 + 9 : length - 20] = 3
        segment_ids[1, length // 2 :] = 4
        segment_ids = jnp.asarray(segment_ids)
    return (q, k, v, g, beta, state), segment_ids, (do, dstate)


def results(function, inputs, cotangents):
    outputs, pull = jax.vjp(jax.jit(function), *inputs)
    return (*outputs, *pull(cotangents))


def assert_equal(got, expected):
    names = "o state dq dk dv dg dbeta dinitial_state".split()
    for name, x, y in zip(names, got, expected, strict=True):
        error = jnp.linalg.norm(x - y) / jnp.linalg.norm(y)
        assert error <= TOLERANCE, f"{name}: {error:.1e}"


def whole(q, k, v, g, beta, state, *, segment_ids):
    return gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        initial_state=state,
        segment_ids=segment_ids,
        use_qk_l2norm=True,
        implementation="xla",
    )


@pytest.mark.parametrize("with_segments", [False, True])
def test_split_over_devices(with_segments):
    inputs, segment_ids, cotangents = make(8 * 70, with_segments)  # 70: not whole chunks
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    time, everywhere = PartitionSpec(None, "sequence"), PartitionSpec()

    def split(q, k, v, g, beta, state):
        def part(q, k, v, g, beta, state, segment_ids):
            return gated_delta_rule(
                q,
                k,
                v,
                g,
                beta,
                initial_state=state,
                segment_ids=segment_ids,
                use_qk_l2norm=True,
                axis_name="sequence",
                implementation="pallas",
            )

        return jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(*[time] * 5, everywhere, None if segment_ids is None else time),
            out_specs=(time, everywhere),
            check_vma=False,
        )(q, k, v, g, beta, state, segment_ids)

    expected = results(functools.partial(whole, segment_ids=segment_ids), inputs, cotangents)
    assert_equal(results(split, inputs, cotangents), expected)


@pytest.mark.parametrize(
    ("programs", "length", "segments"),
    [(4, 4095, 1), (4, 4096, 2), (4, 16384, 4), (2, 16384, 8), (8, 16384, 1)],
)
def test_sequences_are_cut_where_walks_are_few_and_long(programs, length, segments):
    assert count_segments(programs, length, enough=8, most=16) == segments


def test_cut_on_one_device(monkeypatch):
    inputs, segment_ids, cotangents = make(8 * 64 - 40, with_segments=True)
    monkeypatch.setattr(pallas, "count_segments", lambda *_, **__: 4)  # of two chunks each

    def cut(q, k, v, g, beta, state):
        return gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=state,
            segment_ids=segment_ids,
            use_qk_l2norm=True,
            implementation="pallas",
        )

    jaxpr = jax.make_jaxpr(cut)(*inputs)
    assert "gated_delta_walk_homogeneous" in str(jaxpr)  # it is cut
    expected = results(functools.partial(whole, segment_ids=segment_ids), inputs, cotangents)
    assert_equal(results(cut, inputs, cotangents), expected)
