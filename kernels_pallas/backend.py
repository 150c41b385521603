"""The one place where kernels meet a device: platform, `pallas_call` and products.

Kernel bodies are written once. `pallas` hands a body to Triton on a GPU, to Mosaic on a TPU and to
the interpreter elsewhere; `matmul` says what a product may round, which the three agree on:
bfloat16 operands are multiplied exactly and summed in float32, float32 operands are multiplied to
float32 accuracy (three TF32 passes on a GPU, six bfloat16 passes on a TPU), and nothing is left to
a device's default precision. So the interpreter rounds where the hardware rounds.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

PLATFORMS = ("gpu", "tpu", "cpu")
# (platform, interpreted) of `compile_for`. JAX keeps traces by it: what was traced for one platform
# is not used for another.
_forced = jax.make_user_context(None)

# Said at every lowering. What comes after Pallas-Triton is a driver of the same mathematics.
warnings.filterwarnings("ignore", message="The Pallas Triton backend is deprecated")


def platform() -> str:
    """Returns the platform that kernels are traced for: "gpu", "tpu" or "cpu" (interpreted)."""
    if _forced.value is not None:
        return _forced.value[0]
    name = jax.default_backend()
    return name if name in PLATFORMS else "cpu"


@contextlib.contextmanager
def compile_for(name: str, *, interpret: bool = False) -> Iterator[None]:
    """Traces kernels for another platform than the process runs on, to compile ahead of time.

    Args:
      name: "gpu", "tpu" or "cpu".
      interpret: run the platform's kernels, its layouts and blocks included, in the interpreter.

    Raises:
      ValueError: another name.
    """
    if name not in PLATFORMS:
        raise ValueError(f"platform {name!r} is unknown; use one of {', '.join(PLATFORMS)}")
    with _forced((name, interpret)):
        yield


def is_forced() -> bool:
    """Whether `compile_for` is in force."""
    return _forced.value is not None


def suits_kernels() -> bool:
    """Whether the kernels may be taken unnamed: their blocks are cut for what the device has.

    That is a TPU, or an NVIDIA GPU of a data centre (compute capability 8.0, 9.x, 10.x), with
    160 KB of shared memory for a program or more. Others have 64 to 100 KB.
    """
    if platform() != "gpu" or is_forced():
        return platform() != "cpu"
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    return capability == "8.0" or capability.split(".")[0] in ("9", "10")


def is_interpreted() -> bool:
    """Whether kernels run in the interpreter."""
    return platform() == "cpu" or (_forced.value is not None and _forced.value[1])


def pallas(
    body: Callable[..., None],
    *,
    name: str,
    grid: Sequence[int],
    in_specs: Any,
    out_specs: Any,
    out_shape: Any,
    sequential: int = 0,
    num_warps: int = 4,
    num_stages: int = 1,
    aliases: dict[int, int] | None = None,
    vmem_bytes: int = 64 * 2**20,
    fastest_first: Sequence[int] | None = None,
) -> Callable[..., Any]:
    """Makes a `pallas_call` for the platform in force.

    Args:
      body: the kernel.
      name: its name in profiles.
      grid: number of programs along each axis.
      in_specs: as for `pallas_call`.
      out_specs: as for `pallas_call`.
      out_shape: as for `pallas_call`.
      sequential: how many of the last grid axes run in order (TPU; a GPU runs all at once, so
        they must have one program there).
      num_warps: warps a program (GPU).
      num_stages: depth of the software pipeline of loops (GPU).
      aliases: input index to output index, for outputs that take an input's memory.
      vmem_bytes: VMEM that a program may use (TPU); half of what the smallest of them has.
      fastest_first: on a GPU, the grid's axes in the order in which programs are started, the
        fastest one first, for the sake of the L2 cache; None starts with the first axis. The body
        must not ask for its program id then.

    Returns:
      The function of the arrays.
    """
    target = platform()
    options: dict[str, Any] = {}
    if is_interpreted():
        options["interpret"] = True
    elif target == "gpu":
        options["compiler_params"] = pltriton.CompilerParams(
            num_warps=num_warps, num_stages=num_stages
        )
    else:
        parallel = len(grid) - sequential
        options["compiler_params"] = pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
            vmem_limit_bytes=vmem_bytes,
        )
    if target == "gpu" and fastest_first is not None:
        order = tuple(fastest_first)
        grid = [grid[axis] for axis in order]
        in_specs, out_specs = jax.tree.map(
            lambda spec: _reordered(spec, order), (in_specs, out_specs)
        )
    return pl.pallas_call(
        body,
        name=name,
        grid=tuple(grid),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        input_output_aliases=aliases or {},
        **options,
    )


def _reordered(spec: pl.BlockSpec, order: tuple[int, ...]) -> pl.BlockSpec:
    """Makes the block spec of a grid whose axes come in another order."""

    original = spec.index_map
    assert original is not None

    def index_map(*indices):
        return original(*(indices[order.index(axis)] for axis in range(len(order))))

    return pl.BlockSpec(spec.block_shape, index_map)


NN = ((1,), (0,))  # a @ b
NT = ((1,), (1,))  # a @ b.T
TN = ((0,), (0,))  # a.T @ b


def matmul(a: jax.Array, b: jax.Array, contract: Any = NN) -> jax.Array:
    """Multiplies two matrices inside a kernel and sums in float32.

    Args:
      a: matrix, bfloat16 or float32.
      b: matrix of the same dtype.
      contract: which axes are summed over: `NN`, `NT` or `TN`.

    Returns:
      The float32 product (see the module's docstring for what is rounded).
    """
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    precision: Any = None
    if a.dtype == jnp.float32:
        on_gpu = platform() == "gpu" and not is_interpreted()
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if on_gpu else "highest"
    return jax.lax.dot_general(
        a, b, (contract, ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def loop(count: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Calls body(i, carry) for i < count inside a kernel; without a loop where there is one."""
    return body(0, carry) if count == 1 else jax.lax.fori_loop(0, count, body, carry)


def multiply_add(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """Returns a b + c of float32 values of one shape inside a kernel.

    On a GPU it is one instruction, rounded once; XLA has Triton leave products and sums apart.
    """
    if platform() != "gpu" or is_interpreted():
        return a * b + c
    return _ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def sigmoid(x: jax.Array) -> jax.Array:
    """Returns 1 / (1 + e^-x) of float32 values inside a kernel.

    On a GPU four instructions instead of twenty: an exponential and a reciprocal good to 2^-22.
    Far below 0 the rounding of x log2(e) adds a relative error of |x| 2^-24.
    """
    if platform() != "gpu" or is_interpreted():
        return jax.nn.sigmoid(x)
    power = _ptx("ex2.approx.ftz.f32 $0, $1;", x * -math.log2(math.e))
    return _ptx("rcp.approx.ftz.f32 $0, $1;", 1 + power)


def _ptx(instruction: str, *args: jax.Array) -> jax.Array:
    """Applies one instruction to each element of float32 arrays of one shape."""
    (result,) = pltriton.elementwise_inline_asm(
        instruction,
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result
