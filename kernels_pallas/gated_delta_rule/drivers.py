"""Who compiles and launches the rule's kernels: Pallas, or Triton proper where it is faster.

Pallas runs everywhere. Triton, through the extra `triton` (jax-triton), takes over the walks and
the gradient kernel on a Hopper GPU, for bfloat16 and the common key widths. Both drivers compute
the same from the same arrays, so nothing outside this package knows which one is at work. Measured
on one H100 80GB (benchmarks/drivers.py), V 256, bfloat16, milliseconds, Pallas / Triton:

                     B8 T8192    B8 T8192    B16 T4096
                     H12 K96     H16 K128    H12 K96
    walk output      .82 / .63  1.38 / .69   .65 / .52
    walk states      .87 / .77  1.18 / 1.11  .73 / .71
    walk final                               .41 / .28
    walk homogeneous                         .26 / .21
    walk back       1.06 / .82  1.43 / 1.25  .89 / .83
    gradients       2.57 / 2.18 3.53 / 3.27 2.57 / 2.17

(1.38 is with rows read ahead, which the Pallas walk no longer does at K = 128; the whole forward
pass takes 1.72 / 1.34 there since.)
"""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import Blocks
from kernels_pallas.gated_delta_rule.gradients import gradients
from kernels_pallas.gated_delta_rule.walk import walk
from kernels_pallas.gated_delta_rule.walk_back import walk_back

NAMES = ("pallas", "triton")
VARIABLE = "JET_KERNEL_DRIVER"  # environment variable, read when a program is traced
NEEDS = {"jax-triton": (0, 4, 1), "triton": (3, 8, 0)}  # what descriptors made by the host need
KEY_WIDTHS = (64, 96, 128)
INSTALL = "pip install 'jet-jax[triton]'"


class Kernels(NamedTuple):
    """The kernels of a driver that it may have of its own."""

    walk: Callable[..., Any]
    walk_back: Callable[..., Any]
    gradients: Callable[..., Any]


def kernels(driver: str) -> Kernels:
    """Returns the kernels of one of `NAMES`."""
    if driver == "pallas":
        return Kernels(walk, walk_back, gradients)
    # What is imported here needs the extra's packages.
    from kernels_pallas.gated_delta_rule import triton_gradients, triton_walk, triton_walk_back

    return Kernels(triton_walk.walk, triton_walk_back.walk_back, triton_gradients.gradients)


def choose(blocks: Blocks, dtype: Any, key_width: int) -> str:
    """Chooses the driver.

    Args:
      blocks: `blocks.driver` names one; None takes what the environment variable `VARIABLE` names,
        as far as the arguments allow, and else Triton on a Hopper GPU at hand if it can be had.
        Nothing that is compiled ahead for another machine takes it unnamed.
      dtype: of q, k and v.
      key_width: K.

    Returns:
      One of `NAMES`.

    Raises:
      ValueError: the driver named is unknown, or cannot take the arguments or run here.
    """
    named = blocks.driver or os.environ.get(VARIABLE) or None
    if named not in (None, *NAMES):
        source = "driver" if blocks.driver else VARIABLE
        raise ValueError(f"{source}={named!r} is unknown; use one of {NAMES}, or none")
    if named == "pallas":
        return "pallas"
    obstacle = _obstacle(dtype, key_width, is_named=named is not None)
    if obstacle is None:
        return "triton"
    if blocks.driver is not None:
        raise ValueError(f"driver='triton' cannot run here: {obstacle}, or take driver='pallas'")
    return "pallas"


def _obstacle(dtype: Any, key_width: int, *, is_named: bool) -> str | None:
    """Says what keeps Triton from running, and the way out, or returns None."""
    if backend.platform() != "gpu" or backend.is_interpreted():
        return "kernels are not compiled for a GPU; run on one"
    if dtype != jnp.bfloat16:
        return f"q, k and v are {jnp.dtype(dtype)}; cast them to bfloat16"
    if key_width not in KEY_WIDTHS:
        return f"K={key_width}; take one of {KEY_WIDTHS}"
    if backend.is_forced():
        return _missing() if is_named else "kernels are compiled ahead; name the driver"
    capability = getattr(jax.local_devices()[0], "compute_capability", "unknown")
    major = str(capability).split(".")[0]
    # Measured on Hopper; what came after it has other tensor cores and is taken by name only. Other
    # makers' GPUs give a name here ("gfx942").
    if not major.isdigit() or not 9 <= int(major) < (float("inf") if is_named else 10):
        return f"the GPU has compute capability {capability}; take one with 9.0 (Hopper) or more"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Says which package is missing, too old or broken, or returns None."""
    for package, least in NEEDS.items():
        wanted = ".".join(map(str, least))
        if importlib.util.find_spec(package.replace("-", "_")) is None:
            return f"{package} is not installed; {INSTALL}"
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # another distribution brought the module
            return f"{package} is of unknown version and {wanted} is the least; {INSTALL}"
        if tuple(int(x) for x in version.split("+")[0].split(".")[:3] if x.isdigit()) < least:
            return f"{package} is {version} and {wanted} is the least; {INSTALL}"
    try:
        importlib.import_module("jax_triton")
    except Exception as error:
        return f"jax-triton does not import ({type(error).__name__}: {error}); {INSTALL}"
    return None
