"""Files that Python packages ship, without installing or importing the packages."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def download(package: str, files: list[str]) -> dict[str, bytes]:
    """Files of a package's wheel.

    Args:
      package: name and version, such as `evals==3.0.1.post1`.
      files: their paths in the wheel.

    Raises:
      SystemExit: neither pip nor uv is there, or the package does not hold them.
    """
    with tempfile.TemporaryDirectory() as work:
        if importlib.util.find_spec("pip"):
            command = [sys.executable, "-m", "pip", "download", "--dest", work]
        elif shutil.which("uv"):  # uv downloads only by unpacking into a folder
            command = ["uv", "pip", "install", "--target", work, "--python", sys.executable]
        else:
            raise SystemExit(f"{package} cannot be downloaded: install pip or uv")
        command += ["--quiet", "--no-deps", "--only-binary", ":all:", package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{package} was not downloaded: {done.stderr.strip()[-500:]}")
        for wheel in Path(work).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for file in set(files) & set(archive.namelist()):
                    archive.extract(file, work)
        for file in files:
            if not (Path(work) / file).is_file():
                raise SystemExit(f"{package} does not hold {file}")
        return {file: (Path(work) / file).read_bytes() for file in files}
