"""kda and dplr_delta_rule with T cut into segments, and split over devices: as the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gated_delta_inputs import error
from jax.sharding import AxisType, PartitionSpec
from vector_delta import NAMES, OPS, make, outputs_and_gradients

from kernels_pallas.dplr import kernels

LENGTH = 8 * 40  # over eight devices not whole chunks
TOLERANCE = 3e-6  # float32


def inputs_of(op):
    inputs, cotangents = make(op, sizes=(2, LENGTH, 1, 1, 64, 64))
    ids = np.zeros((2, LENGTH), np.int32)  # leading padding, borders inside, a gap
    ids[:, 3 : LENGTH // 6], ids[:, LENGTH // 6 : LENGTH // 2] = 1, 2
    ids[0, LENGTH // 2 + 9 : -20], ids[1, LENGTH // 2 :] = 3, 4
    return inputs, jnp.asarray(ids), cotangents


def assert_close(op, got, expected):
    names = ("o", "state", *("d" + name for name in NAMES[op]))
    for name, x, y in zip(names, got, expected, strict=True):
        assert error(x, y) <= TOLERANCE, name


@pytest.mark.parametrize("op", OPS)
def test_cut_on_one_device(op, monkeypatch):
    inputs, ids, cotangents = inputs_of(op)
    expected = outputs_and_gradients(op, inputs, ids, cotangents, "xla", 64)
    monkeypatch.setattr(kernels, "count_segments", lambda *_, **__: 4)
    got = outputs_and_gradients(op, inputs, ids, cotangents, "pallas", 64)
    assert_close(op, got, expected)


@pytest.mark.parametrize("op", OPS)
def test_split_over_devices(op):
    inputs, ids, cotangents = inputs_of(op)
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    time, everywhere = PartitionSpec(None, "sequence"), PartitionSpec()
    options = dict(axis_name="sequence", implementation="pallas")
    options |= dict(use_qk_l2norm=True) if op == "kda" else {}

    def part(ids, *inputs):
        *rows, state = inputs
        return OPS[op](*rows, initial_state=state, segment_ids=ids, **options)

    @jax.jit
    def split(*inputs):
        rows = [time] * (len(inputs) - 1)
        return jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(time, *rows, everywhere),
            out_specs=(time, everywhere),
            check_vma=False,
        )(ids, *inputs)

    outputs, pull = jax.vjp(split, *inputs)
    expected = outputs_and_gradients(op, inputs, ids, cotangents, "xla", 64)
    assert_close(op, (*outputs, *pull(cotangents)), expected)
