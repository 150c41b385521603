"""Both convolutions with T split over eight devices: all that they give equals the unsharded op."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from kernels_pallas import dynamic_conv, short_conv

DEVICES, WIDTH, CHANNELS, HIDDEN = 8, 4, 16, 16
MESH = jax.make_mesh((DEVICES,), ("time",), axis_types=(AxisType.Auto,))
# Runs of (id, eighths of T, tokens), so that segments start, end and span devices everywhere.
ROWS = (
    [(1, 8, 0)],  # one document over all devices
    [(0, 8, 0)],  # nothing
    [(0, 2, 1), (1, 0, 1), (2, 3, 0), (0, 3, -2)],  # late start, one token, padded devices
    [(0, 2, -1), (1, 4, 1), (0, 2, 0)],  # starts on a device's last token
    [(1, 0, 2), (2, 1, 0), (3, 2, 0), (0, 1, 0), (4, 4, -2)],
    [(0, 7, 2), (5, 1, -2)],  # the last device alone, and the old tail makes up for the rest
)


def segments(length):
    each = length // DEVICES
    rows = [np.repeat([i for i, _, _ in r], [n * each + k for _, n, k in r]) for r in ROWS]
    return np.array(rows, np.int32)


def make(length, name):
    """Returns u, the weights, the tail and random gradients of y and the new tail."""
    rng = np.random.default_rng(0)
    batch = len(ROWS)
    u, y = (batch, length, CHANNELS), (batch, length, CHANNELS)
    weights = {
        "dynamic": [
            (batch, length, HIDDEN),
            (HIDDEN, WIDTH, CHANNELS),
            (WIDTH, CHANNELS),
        ],
        "short": [(WIDTH, CHANNELS), (CHANNELS,)],
    }[name]
    tail = (batch, WIDTH - 1, CHANNELS)
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (u, *weights, tail, y, tail)]
    return tuple(arrays[:-2]), tuple(arrays[-2:])


def run(op, has_tail, axis_name, implementation, inputs, segment_ids):
    *inputs, tail = inputs
    return op(
        *inputs,
        tail=tail if has_tail else None,
        segment_ids=segment_ids,
        axis_name=axis_name,
        implementation=implementation,
    )


def all_results(name, has_tail, implementation, inputs, segment_ids, cotangents, sharded):
    """Returns y, the tail and the gradients of every input."""
    op = {"dynamic": dynamic_conv, "short": short_conv}[name]
    function = functools.partial(run, op, has_tail, "time" if sharded else None, implementation)
    if sharded:
        specs = tuple(
            P(None, "time") if x.shape[:2] == inputs[0].shape[:2] else P() for x in inputs
        )
        function = jax.shard_map(
            function,
            mesh=MESH,
            in_specs=(specs, None if segment_ids is None else P(None, "time")),
            out_specs=(P(None, "time"), P()),
            check_vma=False,
        )
    outputs, pull = jax.vjp(lambda x: function(x, segment_ids), inputs)
    return *outputs, *pull(cotangents)[0]


def assert_equals_unsharded(name, has_tail, is_packed, implementation, length):
    inputs, cotangents = make(length, name)
    ids = jnp.asarray(segments(length)) if is_packed else None
    results = [
        jax.jit(functools.partial(all_results, name, has_tail, kind, sharded=sharded))(
            inputs, ids, cotangents
        )
        for kind, sharded in ((implementation, True), ("xla", False))
    ]
    for got, expected in zip(*results, strict=True):
        assert got.shape == expected.shape
        scale = np.abs(expected).max() + 1e-30
        np.testing.assert_allclose(got / scale, expected / scale, atol=2e-6, rtol=0)


@pytest.mark.parametrize("is_packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("has_tail", [False, True], ids=["zeros", "tail"])
@pytest.mark.parametrize("name", ["dynamic", "short"])
def test_equals_the_unsharded_op(name, has_tail, is_packed):
    assert_equals_unsharded(name, has_tail, is_packed, "xla", 4 * DEVICES)


@pytest.mark.parametrize(("name", "each"), [("dynamic", 128), ("short", 40)])
def test_the_kernel_equals_the_unsharded_op(name, each):
    assert_equals_unsharded(name, True, True, "pallas", each * DEVICES)


def test_the_kernel_runs_on_shards_of_batch_and_channels():
    inputs, (dv, _) = make(160, "dynamic")
    u, h, w2, b2, _ = inputs
    inputs = (jnp.tile(u, 4), h, jnp.tile(w2, 4), jnp.tile(b2, 4))
    ids = jnp.asarray(segments(160))
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = P("data", None, "tensor")
    specs = (rows, P("data"), P(None, None, "tensor"), P(None, "tensor"), P("data"))

    def on_shards(*x):
        return jax.shard_map(
            lambda u, h, w2, b2, ids: dynamic_conv(
                u, h, w2, b2, segment_ids=ids, implementation="pallas"
            )[0],
            mesh=mesh,
            in_specs=specs,
            out_specs=rows,
            check_vma=False,
        )(*x, ids)

    def whole(*x):
        return dynamic_conv(*x, segment_ids=ids, implementation="xla")[0]

    def results(function, dv, *x):
        v, pull = jax.vjp(function, *x)
        return v, *pull(dv)

    dv = jnp.tile(dv, 4)
    got, expected = (
        jax.jit(functools.partial(results, function))(dv, *inputs)
        for function in (on_shards, whole)
    )
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * np.abs(y).max(), rtol=0)


def test_fewer_tokens_than_the_taps_reach_back_are_refused():
    inputs, _ = make(2 * DEVICES, "short")
    function = jax.shard_map(
        lambda u, w: short_conv(u, w, axis_name="time"),
        mesh=MESH,
        in_specs=(P(None, "time"), P()),
        out_specs=(P(None, "time"), P()),
        check_vma=False,
    )
    with pytest.raises(ValueError, match="T=2 tokens a device.*W-1=3.*fewer devices"):
        function(inputs[0], inputs[1])
