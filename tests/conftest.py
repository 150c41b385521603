"""Eight fake CPU devices for every test, and libtpu to compile with; set before JAX starts."""

import atexit
import gc
import os
import shutil
import sys
import tempfile

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Almost all of a test's time is compiling; the values do not depend on this.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
if os.environ["JAX_PLATFORMS"] == "cpu":
    # XLA's older emitters of fused loops: without MLIR a program compiles in half the time.
    os.environ["XLA_FLAGS"] += " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    # libtpu compiles for TPUs that are not there.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # parallel test workers
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no look-up of the machine's own TPU
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None) and "PYTHONPYCACHEPREFIX" not in os.environ:
    # The scripts that tests start would compile all libraries anew each time, some ten seconds.
    os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="jet_jax_bytecode_")
    atexit.register(shutil.rmtree, os.environ["PYTHONPYCACHEPREFIX"], ignore_errors=True)


def pytest_configure(config):
    """Parses absl's flags, which grain reads even outside an absl main."""
    import grain  # noqa: F401  (defines the flags)
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])


def pytest_collection_finish():
    """Collects garbage less often: tracing makes many objects, and what was imported stays.

    With Python's thresholds an eighth of a test's time goes into it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)


def pytest_collection_modifyitems(items):
    """Skips tests that need an accelerator which is not there."""
    import jax

    for item in items:
        for marker in ("gpu", "tpu"):
            if item.get_closest_marker(marker) and jax.default_backend() != marker:
                item.add_marker(pytest.mark.skip(reason=f"needs a {marker.upper()}"))


@pytest.fixture
def fast_compiles():
    """Leaves more of XLA's optimizations out, a third of a TPU's compile time.

    What Mosaic does with kernels is the same.
    """
    import jax

    before = jax.config.jax_optimization_level
    jax.config.update("jax_optimization_level", "O0")
    yield
    jax.config.update("jax_optimization_level", before)
