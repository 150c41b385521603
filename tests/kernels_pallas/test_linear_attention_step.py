"""One step of linear attention in the kernel: against float64, row by row, and in place."""

import functools
import re

import compile_cases_linear_attention as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import backend, linear_attention_step
from kernels_pallas.gated_delta_rule.blocks import StepBlocks
from kernels_pallas.linear_attention.step_pallas import step_pallas

# Rounding a result once: half a unit in the last of 8 bits, 1.7e-3 on average. In float32 the sums.
TOLERANCE = {jnp.float32: 1e-6, jnp.bfloat16: 2.5e-3}


def make(b, h, hv, k, v, dtype=jnp.float32, state_dtype=jnp.float32, decay="channel"):
    """Returns q, k, v, g (one a head or a channel, or None) and the state."""
    rng = np.random.default_rng(k * v)
    q, keys, values = (rng.normal(size=s) for s in ((b, h, k), (b, h, k), (b, hv, v)))
    g = -np.exp(rng.normal(size=(b, hv, k)))
    g = {"channel": g, "head": g[..., 0], None: None}[decay]
    wide = [jnp.asarray(x, dtype) for x in (q, keys, values)]
    state = jnp.asarray(rng.normal(size=(b, hv, k, v)), state_dtype)
    return *wide, None if g is None else jnp.asarray(g, jnp.float32), state


def expected(q, k, v, g, state, scale=None):
    q, k, v, state = (np.asarray(x, np.float64) for x in (q, k, v, state))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    g = np.zeros(v.shape[:2]) if g is None else np.asarray(g, np.float64)
    q, k = (np.repeat(x, v.shape[1] // q.shape[1], axis=1) for x in (q, k))
    g = g if g.ndim == 3 else g[..., None]
    state = np.exp(g)[..., None] * state + k[..., None] * v[:, :, None]
    return scale * np.einsum("bhkv,bhk->bhv", state, q), state


def error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@functools.partial(jax.jit, static_argnames=("platform", "scale", "blocks"))
def run(args, platform="cpu", scale=None, blocks=None):
    with backend.compile_for(platform, interpret=True):
        return step_pallas(*args, scale=scale, blocks=blocks)


def check(args, platform="cpu", scale=None, blocks=None):
    o, state = run(args, platform, scale, blocks)
    assert o.dtype == args[2].dtype and state.dtype == args[4].dtype
    want_o, want_state = expected(*args, scale=scale)
    assert error(o, want_o) < TOLERANCE[o.dtype.type]
    assert error(state, want_state) < TOLERANCE[state.dtype.type]


@pytest.mark.parametrize(
    ("key_width", "width", "decay"),
    [(64, 64, "head"), (96, 144, "channel"), (192, 384, "channel"), (256, 48, None)],
)
def test_widths_and_decays(key_width, width, decay):
    check(make(1, 1, 1, key_width, width, decay=decay))


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
@pytest.mark.parametrize("decay", ["head", "channel", None])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layouts_of_both_platforms_with_shared_keys(platform, dtype, decay):
    check(make(2, 2, 6, 96, 144, dtype, dtype, decay), platform, scale=0.3)


@pytest.mark.parametrize("fitting", [1, 2, 6])
def test_a_tpu_program_takes_whole_groups_or_part_of_one(fitting):
    args = make(2, 2, 6, 64, 64)
    check(args, "tpu", blocks=StepBlocks(head_bytes=fitting * args[4][0, 0].nbytes))


@pytest.mark.parametrize(("platform", "decay"), [("cpu", "channel"), ("tpu", "head")])
def test_a_row_that_writes_nothing_keeps_its_state_bit_for_bit(platform, decay):
    q, k, v, g, state = make(3, 1, 2, 96, 64, state_dtype=jnp.bfloat16, decay=decay)
    off = np.zeros((3, 2), bool)
    off[1], off[2, 0] = True, True
    v = jnp.where(off[..., None], 0, v)
    g = jnp.where(off.reshape(off.shape + (1,) * (g.ndim - 2)), 0, g)
    _, new_state = run((q, k, v, g, state), platform)
    np.testing.assert_array_equal(np.asarray(new_state)[off], np.asarray(state)[off])
    assert not np.any(np.all(np.asarray(new_state == state), axis=(2, 3)) & ~off)


def test_steps_follow_the_sequence():
    """Many steps, the state handed on."""
    q, k, v, g, state = make(20, 1, 2, 64, 64)
    tokens = [x[:, None] for x in (q, k, v, 0.1 * g)]

    def step(state, token):
        o, state = linear_attention_step(*token, state, implementation="pallas")
        return state, o

    last, o = jax.jit(lambda s, x: jax.lax.scan(step, s, x))(state[:1], tokens)
    want = np.asarray(state[:1], np.float64)
    for t in range(20):
        want_o, want = expected(*(x[t] for x in tokens), want)
        assert error(o[t], want_o) < 2e-6
    assert error(last, want) < 2e-6


@pytest.mark.parametrize("index", range(len(cases.STEPS)))
def test_on_a_gpu_the_step_is_one_kernel_in_place(index):
    """What is lowered for an H100 is the kernel and nothing else, its state the donated one."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    _, function, shapes = cases.STEPS[index]
    with jax.sharding.use_abstract_mesh(mesh), backend.compile_for("gpu"):
        step = jax.jit(function, donate_argnums=4)
        text = step.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"stablehlo\.(\w+)[ (]", text) == ["custom_call"]
    alias = r"output_operand_alias<output_tuple_indices = \[1\], operand_index = 4"
    assert re.search(alias, text)
    assert re.search(r"%arg4: tensor<[^>]*> {[^}]*tf.aliasing_output = 1", text)


def test_widths_the_kernel_does_not_take_fall_back_unless_it_is_named():
    for sizes, reason in (((1, 1, 1, 72, 64), "K=72"), ((1, 1, 1, 64, 40), "V=40")):
        args = make(*sizes)
        with pytest.raises(ValueError, match=reason):
            linear_attention_step(*args, implementation="pallas")
        with backend.compile_for("tpu"):  # where the kernel would come first
            o, state = linear_attention_step(*args)
        want_o, want_state = expected(*args)
        assert error(o, want_o) < 1e-6 and error(state, want_state) < 1e-6
