"""One decoding step in the kernel: against float64 NumPy, row by row, in place, and on a mesh."""

import functools
import re

import compile_cases_step
import jax
import jax.numpy as jnp
import kernel_oracles as oracle
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels_pallas import backend, gated_delta_step
from kernels_pallas.gated_delta_rule import step_pallas
from kernels_pallas.gated_delta_rule.blocks import StepBlocks, find_step_blocks

KEY_WIDTHS = (64, 96, 128, 192, 256)
VALUE_WIDTHS = (64, 128, 144, 192, 256, 288, 384, 512, 576)
# Rounding a result once: half a unit in the last of 8 bits, 1.7e-3 on average. In float32 the sums.
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2.5e-3}


def make(b, h, hv, k, v, dtype=jnp.float32, state_dtype=jnp.float32, decay=1.0):
    """Returns q, k, v, g, beta and the state; keys share a direction, as after SiLU."""
    rng = np.random.default_rng(k * v)
    q, keys = rng.normal(size=(2, b, h, k)) + 0.5
    g = -decay * np.exp(rng.normal(size=(b, hv)))
    beta = 1 / (1 + np.exp(-rng.normal(size=(b, hv))))
    state = rng.normal(size=(b, hv, k, v))
    wide = [jnp.asarray(x, dtype) for x in (q, keys, rng.normal(size=(b, hv, v)))]
    gates = [jnp.asarray(x, jnp.float32) for x in (g, beta)]
    return *wide, *gates, jnp.asarray(state, state_dtype)


def expected(args, **options):
    *row, state = (np.asarray(x, np.float64) for x in args)
    row = [x[:, None] for x in row]
    zeros = np.zeros_like(row[2]), np.zeros_like(state)
    o, state, *_ = oracle.gated_delta_rule((*row, state), None, zeros, **options)
    return o[:, 0], state


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@functools.partial(jax.jit, static_argnames=("platform", "scale", "norm"))
def run(args, platform="cpu", scale=None, norm=True):
    with backend.compile_for(platform, interpret=True):
        return gated_delta_step(*args, scale=scale, use_qk_l2norm=norm, implementation="pallas")


def check(args, platform, scale=None, norm=True):
    o, state = run(args, platform, scale, norm)
    assert o.dtype == args[2].dtype and state.dtype == args[5].dtype
    want_o, want_state = expected(args, scale=scale, use_qk_l2norm=norm)
    assert error(o, want_o) < TOLERANCE[o.dtype.type]
    assert error(state, want_state) < TOLERANCE[state.dtype.type]


WIDTHS = [
    (key_width, value_width)
    for i, key_width in enumerate(KEY_WIDTHS)
    for j, value_width in enumerate(VALUE_WIDTHS)
    if (i + j) % 3 == 0  # every width of either, in a third of the pairs
]


@pytest.mark.parametrize(("key_width", "value_width"), WIDTHS)
def test_every_width_of_the_papers_grid(key_width, value_width):
    state_dtype = jnp.bfloat16 if (key_width + value_width) % 3 == 0 else jnp.float32
    check(make(1, 1, 1, key_width, value_width, jnp.float32, state_dtype), "cpu")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layouts_of_both_platforms(platform, state_dtype, dtype):
    check(make(2, 2, 6, 96, 144, dtype, state_dtype), platform)


@pytest.mark.parametrize(
    ("heads", "fitting", "taken"),
    [((4, 4), 3, 2), ((2, 4), 1, 1), ((2, 4), 2, 2), ((1, 3), 2, 1), ((2, 4), 4, 4)],
)
def test_a_tpu_program_takes_whole_groups_or_part_of_one(heads, fitting, taken):
    args = make(2, *heads, 64, 64)
    state = args[5]
    head_bytes = fitting * state[0, 0].nbytes
    assert step_pallas.heads_a_program(state, heads[1] // heads[0], head_bytes) == taken
    with backend.compile_for("tpu", interpret=True):
        o, new_state = jax.jit(
            functools.partial(
                step_pallas.step_pallas,
                scale=None,
                use_qk_l2norm=True,
                blocks=StepBlocks(head_bytes=head_bytes),
            )
        )(*args)
    want_o, want_state = expected(args)
    assert error(o, want_o) < 1e-6 and error(new_state, want_state) < 1e-6


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_no_norm_own_scale_no_decay(platform):
    q, k, v, g, beta, state = make(1, 2, 2, 64, 64)
    k = k / 8
    check((q, k, v, g, beta, state), platform, scale=0.3, norm=False)
    o, new_state = run((q, k, v, None, beta, state), platform, norm=False)
    want_o, want_state = expected((q, k, v, 0 * g, beta, state), use_qk_l2norm=False)
    assert error(o, want_o) < 1e-6 and error(new_state, want_state) < 1e-6


@pytest.mark.parametrize("state_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_row_that_writes_nothing_keeps_its_state_bit_for_bit(platform, state_dtype):
    q, k, v, g, beta, state = make(3, 1, 2, 96, 64, state_dtype=state_dtype)
    off = np.zeros((3, 2), bool)
    off[1], off[2, 0] = True, True
    g, beta = jnp.where(off, 0, g), jnp.where(off, 0, beta)
    v = v.at[1].set(jnp.inf)  # whatever stands in an empty row
    o, new_state = run((q, k, v, g, beta, state), platform)
    assert np.isfinite(np.asarray(o)).all()
    np.testing.assert_array_equal(np.asarray(new_state)[off], np.asarray(state)[off])
    assert not np.any(np.all(np.asarray(new_state == state), axis=(2, 3)) & ~off)


@pytest.mark.parametrize("decay", [0.0, 30.0])
def test_no_and_strong_decay(decay):
    check(make(1, 1, 2, 64, 64, decay=decay), "cpu")


def test_blocks_of_the_table_are_whole_blocks_and_fit_registers():
    for key_width in KEY_WIDTHS:
        for rows, state_dtype in ((12, jnp.float32), (1536, jnp.float32), (1536, jnp.bfloat16)):
            blocks = find_step_blocks(rows, key_width, 256, jnp.dtype(state_dtype))
            assert blocks.v_block & (blocks.v_block - 1) == 0
            # The block's values a thread, of 255 registers, with rows and products beside them.
            assert key_width * blocks.v_block // (32 * blocks.warps) <= 96


def test_steps_follow_the_sequence():
    """Many steps, the state handed on, against one float64 run over the tokens."""
    q, k, v, g, beta, state = make(20, 1, 1, 64, 64, decay=0.1)
    tokens = [x[None] for x in (q, k, v, g, beta)]  # the batch becomes the tokens of one row
    zeros = np.zeros((1, 20, 1, 64)), np.zeros((1, 1, 64, 64))
    want_o, want_state, *_ = oracle.gated_delta_rule((*tokens, state[:1]), None, zeros)

    def step(state, token):
        with backend.compile_for("cpu", interpret=True):
            o, state = gated_delta_step(*token, state, use_qk_l2norm=True, implementation="pallas")
        return state, o

    rows = [jnp.swapaxes(x, 0, 1) for x in tokens]
    last, o = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(state[:1], rows)
    assert error(o[:, 0], want_o[0]) < 2e-6 and error(last, want_state) < 2e-6


def test_on_a_mesh_as_on_one_device():
    """Rows and heads split over eight devices, value heads beside the keys they use."""
    args = make(4, 2, 4, 64, 64)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    spec = P("data", "tensor")

    def step(*args):
        return gated_delta_step(*args, use_qk_l2norm=True, implementation="pallas")

    split = jax.shard_map(step, mesh=mesh, in_specs=(spec,) * 6, out_specs=spec, check_vma=False)
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in args]
    o, state = jax.jit(split)(*placed)
    assert len(state.sharding.device_set) == 8
    want_o, want_state = run(args)
    np.testing.assert_array_equal(o, want_o)
    np.testing.assert_array_equal(state, want_state)


def test_on_a_gpu_the_step_is_one_kernel_in_place():
    """What is lowered for an H100 is the kernel and nothing else, its state the donated one."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    _, function, shapes = compile_cases_step.CASES[2]
    with jax.sharding.use_abstract_mesh(mesh), backend.compile_for("gpu"):
        step = jax.jit(function, donate_argnums=5)
        text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"stablehlo\.\w+[ (]", text)) == 1
    assert re.findall(r"stablehlo\.(\w+)", text)[0] == "custom_call"
    alias = r"output_operand_alias<output_tuple_indices = \[1\], operand_index = 5"
    assert re.search(alias, text)
    assert re.search(r"%arg5: tensor<128x12x96x256xf32> {[^}]*tf.aliasing_output = 1", text)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"state": np.zeros((1, 2, 64, 32))}, ValueError, r"state has shape .*V=64\]"),
        ({"state": np.zeros((1, 2, 64, 64), np.float16)}, ValueError, "state has dtype float16"),
        ({"state": np.zeros((1, 2, 64, 64), np.int32)}, ValueError, "state has dtype int32"),
        ({"q": np.zeros((1, 2, 48))}, ValueError, r"k has shape .*K=48\]"),
        ({"g": np.zeros((1, 3))}, ValueError, r"g has shape .*HV=2\]"),
        ({"k": np.zeros((1, 2, 64), np.float16)}, ValueError, "k float16"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message):
    names = ("q", "k", "v", "g", "beta", "state")
    args = dict(zip(names, make(1, 2, 2, 64, 64), strict=True)) | change
    with pytest.raises(error, match=message):
        gated_delta_step(**args, implementation="pallas")


def test_widths_the_kernel_does_not_take_fall_back_unless_it_is_named():
    for sizes, reason in (((1, 1, 1, 72, 64), "K=72"), ((1, 1, 1, 64, 40), "V=40")):
        args = make(*sizes)
        with pytest.raises(ValueError, match=reason):
            gated_delta_step(*args, implementation="pallas")
        with backend.compile_for("tpu"):  # where the kernel would come first
            o, state = gated_delta_step(*args, use_qk_l2norm=True)
        want_o, want_state = expected(args)
        assert error(o, want_o) < 1e-6 and error(state, want_state) < 1e-6
