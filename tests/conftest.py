"""Eight fake CPU devices for every test, set before JAX starts."""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
_flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in _flags:
    os.environ["XLA_FLAGS"] = f"{_flags} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # parallel test workers


def pytest_configure(config):
    """Parses absl's flags, which grain reads even outside an absl main."""
    from absl import flags

    import grain  # noqa: F401  (defines the flags)

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
