"""Every kernel is compiled for machines that are not there, at the sizes of the real models.

For TPUs libtpu compiles to the end, so a block that Mosaic refuses, a program that overflows its
memory and a model that overflows the device are all errors here. For NVIDIA GPUs JAX alone lowers
kernels as far as Triton's language. Last, every product in every kernel must say its precision,
which makes the interpreter round where the hardware rounds.
"""

import functools
import importlib.util

import compile_cases_conv
import compile_cases_gdr
import compile_cases_kda_dplr
import compile_cases_linear_attention
import compile_cases_short_conv
import compile_cases_step
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, NamedSharding, PartitionSpec

from kernels_pallas import backend

MODULES = (
    compile_cases_gdr,
    compile_cases_kda_dplr,
    compile_cases_linear_attention,
    compile_cases_step,
    compile_cases_conv,
    compile_cases_short_conv,
)
CASES = {name: case for module in MODULES for name, *case in module.CASES}
WIDTHS = {name: case for module in MODULES for name, *case in module.WIDTHS}
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Long sequences are a matter of the device's memory, of which a v5e has least: 16 GB. The kernels
# are those of the shorter ones, which every generation compiles.
ON_TPUS = [
    (generation, case)
    for generation in TOPOLOGIES
    for case in CASES
    if generation == "v5e" or not case.endswith(("T=262144", "T=65536"))
]
# What a kernel is called in a compiled program.
TPU_KERNEL, GPU_KERNEL = "tpu_custom_call", "__gpu$xla.gpu.triton"

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: uv run --extra dev --extra tpu pytest",
)


@functools.cache
def jitted(case):
    """The function of a case, traced once for each platform, and the shapes of its arguments."""
    function, shapes = (CASES | WIDTHS)[case]
    return jax.jit(function), shapes


def compile_for_tpu(generation, function, shapes):
    """Compiles for one chip."""
    topology = topologies.get_topology_desc(TOPOLOGIES[generation], platform="tpu")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in shapes]
    with backend.compile_for("tpu"):
        lowered = function.trace(*shapes).lower(lowering_platforms=("tpu",))
    return lowered.compile()


@needs_libtpu
@pytest.mark.parametrize(("generation", "case"), ON_TPUS)
def test_tpu(generation, case, fast_compiles):
    assert TPU_KERNEL in compile_for_tpu(generation, *jitted(case)).as_text()


@needs_libtpu
@pytest.mark.parametrize("case", WIDTHS)
def test_tpu_takes_the_widths_of_the_search(case, fast_compiles):
    assert TPU_KERNEL in compile_for_tpu("v5e", *jitted(case)).as_text()


@needs_libtpu
def test_a_block_too_large_for_a_tpu_is_an_error(fast_compiles):
    def copy(x):
        spec = pl.BlockSpec((8192, 1024), lambda i: (i, 0))  # 32 MB in, 32 MB out, twice
        options = dict(grid=(2,), in_specs=[spec], out_specs=spec, out_shape=x)
        return backend.pallas(lambda x, y: y.__setitem__(..., x[...]), name="copy", **options)(x)

    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        compile_for_tpu("v5e", jax.jit(copy), [jax.ShapeDtypeStruct((16384, 1024), jnp.float32)])


@pytest.mark.parametrize("case", CASES | WIDTHS)
def test_cuda(case):
    function, shapes = jitted(case)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    is_known = jax.export.DisabledSafetyCheck.custom_call(GPU_KERNEL)
    with jax.sharding.use_abstract_mesh(mesh), backend.compile_for("gpu"):
        export = jax.export.export(function, platforms=["cuda"], disabled_checks=[is_known])
        assert GPU_KERNEL in export(*shapes).mlir_module()


def equations(jaxpr, in_kernel=False):
    """Yields (equation, whether it is in a kernel) of a jaxpr and all jaxprs inside."""
    for equation in jaxpr.eqns:
        yield equation, in_kernel
        inside = in_kernel or equation.primitive.name == "pallas_call"
        for value in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inside)


def is_explicit(product):
    """Whether nothing is left to a device's default precision."""
    dtypes = {x.aval.dtype for x in product.invars}
    precision = product.params["precision"]
    if dtypes == {jnp.dtype(jnp.bfloat16)}:  # exact products
        return product.params["preferred_element_type"] == jnp.float32
    highest, tf32x3 = jax.lax.Precision.HIGHEST, jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return dtypes == {jnp.dtype(jnp.float32)} and precision in (tf32x3, (highest, highest))


@pytest.mark.parametrize("case", CASES | WIDTHS)
@pytest.mark.parametrize("platform", backend.PLATFORMS)
def test_every_product_says_its_precision(platform, case):
    function, shapes = jitted(case)
    with backend.compile_for(platform):
        found = list(equations(function.trace(*shapes).jaxpr.jaxpr))
    assert any(in_kernel for _, in_kernel in found)
    products = [x for x, _ in found if x.primitive.name == "dot_general"]
    assert products or "step" in case or "short_conv" in case  # these multiply and sum
    vague = [x for x in products if not is_explicit(x)]
    assert not vague, vague


def test_a_trace_for_one_platform_is_not_used_for_another():
    function, shapes = CASES["gated_delta_step, 2B, B=1"]
    jitted, kinds = jax.jit(function), []
    for platform in backend.PLATFORMS:
        with backend.compile_for(platform):
            found = [x for x, _ in equations(jitted.trace(*shapes).jaxpr.jaxpr)]
        kinds += [x.params["compiler_params"] for x in found if x.primitive.name == "pallas_call"]
    assert len({type(x) for x in kinds}) == len(backend.PLATFORMS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_interpreted_products_round_only_their_operands(dtype):
    a, b = jax.random.normal(jax.random.key(0), (2, 64, 64)).astype(dtype)

    def body(a_ref, b_ref, o_ref):
        o_ref[...] = backend.matmul(a_ref[...], b_ref[...])

    spec = pl.BlockSpec((64, 64), lambda i: (0, 0))
    options = dict(grid=(1,), in_specs=[spec, spec], out_specs=spec)
    out_shape = jax.ShapeDtypeStruct(a.shape, jnp.float32)
    got = backend.pallas(body, name="product", out_shape=out_shape, **options)(a, b)
    exact = np.asarray(a, np.float64) @ np.asarray(b, np.float64)
    assert np.linalg.norm(got - exact) < 1e-6 * np.linalg.norm(exact)
