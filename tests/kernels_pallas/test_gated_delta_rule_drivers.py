"""Which driver runs the rule's kernels, and that Triton's compile and compose without a GPU."""

import dataclasses
import importlib.metadata
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule import blocks, drivers
from kernels_pallas.gated_delta_rule.folding import fold_mapped_axis
from kernels_pallas.gated_delta_rule.gates import GateRows
from kernels_pallas.gated_delta_rule.kernel_math import Scores
from kernels_pallas.gated_delta_rule.pallas import gated_delta_rule_pallas

BF16 = jnp.dtype("bfloat16")
TRITON_KERNEL = "@triton_kernel_call_ffi"
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None
    or not any(importlib.util.find_spec(name) for name in PLUGINS),
    reason="needs the extras: uv run --extra dev --extra cuda --extra triton pytest",
)


def choose(driver, dtype=BF16, key_width=96):
    return drivers.choose(blocks.Blocks(driver=driver), dtype, key_width)


@pytest.fixture
def packages(monkeypatch):
    """Installs packages by name and version, as far as the choice of a driver can tell."""
    installed = {"jax-triton": "0.4.1", "triton": "3.8.0"}
    spec = lambda name: installed.get(name.replace("_", "-"))  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", spec)
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    monkeypatch.setitem(sys.modules, "jax_triton", types.ModuleType("jax_triton"))
    drivers._missing.cache_clear()
    yield installed
    drivers._missing.cache_clear()


@pytest.fixture
def gpu(monkeypatch, packages):
    """A GPU at hand, of the compute capability that the test sets."""
    device = types.SimpleNamespace(compute_capability="9.0")
    monkeypatch.setattr(backend, "platform", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    return device


def test_takes_triton_on_a_hopper_gpu_where_it_is_installed(gpu):
    assert choose(None) == choose("triton") == "triton"
    assert choose("pallas") == "pallas"


@pytest.mark.parametrize("dtype, key_width", ((BF16, 192), (BF16, 160), (jnp.float32, 96)))
def test_leaves_the_rest_to_pallas(gpu, dtype, key_width):
    assert choose(None, dtype, key_width) == "pallas"
    with pytest.raises(ValueError, match=f"K={key_width}|float32"):
        choose("triton", dtype, key_width)


def test_a_gpu_that_it_was_not_measured_on_takes_it_by_name(gpu):
    gpu.compute_capability = "10.0"
    assert choose(None) == "pallas" and choose("triton") == "triton"
    gpu.compute_capability = "8.0"
    assert choose(None) == "pallas"
    with pytest.raises(ValueError, match=r"capability 8\.0; take one with 9\.0 .*driver='pallas'"):
        choose("triton")
    gpu.compute_capability = "gfx942"
    assert choose(None) == "pallas"
    with pytest.raises(ValueError, match="capability gfx942"):
        choose("triton")


@pytest.mark.parametrize(
    "package, version, message",
    (
        ("jax-triton", None, "jax-triton is not installed; pip install 'jet-jax"),
        ("triton", None, "triton is not installed"),
        ("triton", "3.7.1+git1", "triton is 3.7.1.git1 and 3.8.0 is the least"),
    ),
)
def test_says_what_is_missing(gpu, packages, package, version, message):
    packages.pop(package)
    if version:
        packages[package] = version
    assert choose(None) == "pallas"
    with pytest.raises(ValueError, match=message):
        choose("triton")


def test_a_module_of_another_distribution_is_not_taken(gpu, monkeypatch):
    def version(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert choose(None) == "pallas"
    with pytest.raises(ValueError, match="jax-triton is of unknown version"):
        choose("triton")


def test_a_broken_installation_is_not_taken(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_triton", None)
    assert choose(None) == "pallas"
    with pytest.raises(ValueError, match="does not import"):
        choose("triton")


def test_a_newer_triton_will_do(gpu, packages):
    packages["triton"] = "3.10.0"
    assert choose(None) == "triton"


def test_what_is_compiled_for_another_machine_takes_it_by_name_only(packages):
    with backend.compile_for("gpu"):
        assert choose(None) == "pallas" and choose("triton") == "triton"
    with backend.compile_for("gpu", interpret=True), pytest.raises(ValueError, match="for a GPU"):
        choose("triton")


def test_the_environment_names_a_driver_as_far_as_it_can_run(gpu, monkeypatch):
    monkeypatch.setenv("JET_KERNEL_DRIVER", "pallas")
    assert choose(None) == "pallas" and choose("triton") == "triton"
    monkeypatch.setenv("JET_KERNEL_DRIVER", "triton")
    assert choose(None) == "triton" and choose("pallas") == "pallas"
    assert choose(None, jnp.float32) == "pallas"
    with backend.compile_for("gpu"):
        assert choose(None) == "triton"
    monkeypatch.setenv("JET_KERNEL_DRIVER", "cuda")
    with pytest.raises(ValueError, match="JET_KERNEL_DRIVER='cuda' is unknown"):
        choose(None)


def test_a_cpu_has_pallas():
    assert choose(None) == "pallas"
    with pytest.raises(ValueError, match="driver='triton' cannot run here: .* run on one"):
        choose("triton")
    with pytest.raises(ValueError, match="driver='cuda' is unknown; use one of"):
        choose("cuda")


def test_vmap_folds_its_axis_into_the_batch():
    shapes = []

    @fold_mapped_axis
    def sums(x, pair):
        shapes.append(x.shape)
        return x + pair[0], (pair[1] * x.sum(axis=1, keepdims=True),)

    x = jnp.arange(24.0).reshape(2, 3, 4)
    y, z = x[0] + 1, 2 * x
    call = lambda x, y, z: sums(x, (y, z))  # noqa: E731
    got, (other,) = jax.jit(jax.vmap(call, (0, None, 0)))(x, y, z)
    np.testing.assert_array_equal(got, x + y)
    np.testing.assert_array_equal(other, z * x.sum(axis=2, keepdims=True))
    assert shapes[-1] == (6, 4)
    twice = jax.vmap(jax.vmap(call, (0, None, 0)), (None, None, 0))(x, y, jnp.stack([z, z + 1]))
    np.testing.assert_array_equal(twice[0][1], x + y)
    assert shapes[-1] == (12, 4)


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def lower_for_h100(function, *arrays, devices=1):
    """Compiles to PTX inside a module for XLA."""
    mesh = AbstractMesh((devices,), ("x",), (jax.sharding.AxisType.Auto,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh), backend.compile_for("gpu"):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def results(text):
    (main,) = [line for line in text.splitlines() if "func.func public" in line]
    return main.split("->")[1].count("tensor<")


@needs_triton
@pytest.mark.parametrize("key_width", drivers.KEY_WIDTHS)
def test_every_walk_compiles_for_an_h100(key_width, monkeypatch):
    """With all its blocks; each is one call with no more results than its kind has."""
    run = drivers.kernels("triton")
    matrix, factor = shape(1, 4, 256, 64), shape(1, 4, 4, 64, dtype=jnp.float32)
    keys, values = shape(1, 256, 2, key_width), shape(1, 256, 4, 128)
    scores = Scores(matrix, matrix, factor, factor, factor)
    arrays = keys, keys, values, scores, factor, shape(1, 4, 128, key_width, dtype=jnp.float32)
    table = blocks.Blocks()
    kinds = {"output": 2, "states": 3, "final": 1, "homogeneous": 1}
    calls = {
        f"walk {kind}": (lambda *a, kind=kind: run.walk(kind, *a, blocks=table), count)
        for kind, count in kinds.items()
    }
    for name, store, count in (("walk back", True, 3), ("walk back final", False, 1)):
        calls[name] = (lambda *a, s=store: run.walk_back(*a, store=s, blocks=table), count)
    for name, (call, count) in calls.items():
        for tile in blocks.TRITON.get(name, (blocks.TritonBlocks(),)):
            monkeypatch.setitem(blocks.TRITON, name, (tile,))
            text = lower_for_h100(lambda *a, call=call: call(*a), *arrays)
            assert (text.count(TRITON_KERNEL), results(text)) == (1, count), (name, tile)


@needs_triton
@pytest.mark.parametrize("key_width", drivers.KEY_WIDTHS)
def test_the_gradient_kernel_compiles_for_an_h100(key_width):
    keys, values = shape(1, 256, 2, key_width), shape(1, 256, 4, 128)
    gates = GateRows(*[shape(1, 4, 4, 64, dtype=jnp.float32)] * 5)
    states = shape(1, 4, 4, 128, key_width)
    arrays = keys, keys, gates, values, values, values, states, states
    run, options = drivers.kernels("triton").gradients, dict(blocks=blocks.Blocks(), scale=0.1)
    for norm, dtype in ((True, "bfloat16"), (False, "float32")):
        call = lambda *a, x=(norm, dtype): run(  # noqa: E731
            *a, use_qk_l2norm=x[0], dtype=jnp.dtype(x[1]), **options
        )
        text = lower_for_h100(call, *arrays)
        assert text.count(TRITON_KERNEL) == 1
        assert f"tensor<1x256x4x{key_width}x{'bf16' if norm else 'f32'}>" in text.split("->")[1]


@pytest.mark.parametrize(
    "kernel, rows, width, columns, stages",
    (
        ("walk output", 96, 256, 64, 3),  # 3 rounds of 64 columns, 2 longer ones of 128
        ("walk output", 192, 256, 128, 3),  # 6 and 3
        ("walk output", 192, 192, 64, 3),  # 128 columns do not divide V
        ("walk back", 96, 256, 64, 3),  # 3 rounds of one program, 2 of two
        ("walk back", 192, 256, 64, 2),  # 6 and 3
        ("walk final", 192, 256, 64, 3),
    ),
)
def test_takes_the_blocks_whose_programs_end_first(kernel, rows, width, columns, stages):
    tile = blocks.find_triton_walk(kernel, rows, width)
    assert (tile.columns, tile.stages) == (columns, stages)


def rule(q, k, v, g, beta, state, programs=0):
    table = dataclasses.replace(blocks.find_blocks("gpu", 96), driver="triton", programs=programs)
    return gated_delta_rule_pallas(
        q,
        k,
        v,
        g,
        beta,
        scale=None,
        initial_state=state,
        segment_ids=None,
        use_qk_l2norm=True,
        state_dtype=jnp.dtype("float32"),
        chunk_size=64,
        axis_name=None,
        blocks=table,
    )


def rule_shapes(rows, length):
    keys, gate = shape(rows, length, 2, 96), shape(rows, length, 2, dtype=jnp.float32)
    return (
        keys,
        keys,
        shape(rows, length, 2, 64),
        gate,
        gate,
        shape(rows, 2, 96, 64, dtype=gate.dtype),
    )


@needs_triton
def test_runs_inside_shard_map_scan_and_checkpoint():
    """As in a model; and the walk that the backward pass does not need is not run for it."""

    def layers(q, k, v, g, beta, state):
        @jax.checkpoint
        def layer(v, _):
            return v + rule(q, k, v, g, beta, state)[0], None

        return jax.lax.scan(layer, v, None, length=3)[0]

    def gradient(*arrays):
        split = jax.P("x")
        each = jax.shard_map(layers, in_specs=(split,) * 6, out_specs=split, check_vma=False)
        out, pull = jax.vjp(each, *arrays)
        return pull(out)

    text = lower_for_h100(gradient, *rule_shapes(8, 128), devices=8)
    assert text.count(TRITON_KERNEL) == 4  # output; states, the walk back, gradients


@needs_triton
def test_segments_walk_side_by_side():
    def gradient(*arrays):
        out, pull = jax.vjp(lambda *x: rule(*x, programs=8), *arrays)
        return pull(out)

    # Forward: each segment's N, its M, all outputs; backward: states, dN, dV and dS, gradients.
    text = lower_for_h100(gradient, *rule_shapes(1, 4096))
    assert text.count(TRITON_KERNEL) == 7


@needs_triton
def test_vmap():
    arrays = [x.update(shape=(3, *x.shape)) for x in rule_shapes(2, 64)]
    text = lower_for_h100(jax.vmap(rule), *arrays)
    assert text.count(TRITON_KERNEL) == 1 and "tensor<6x64x2x64xbf16>" in text
