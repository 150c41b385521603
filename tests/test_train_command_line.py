"""Mistakes on `train.py`'s command line: each is one line that names the thing, no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/nope.py"], "no config file configs/nope.py; the current folder is"),
        ([QUICKSTART + ":smok"], "configs/quickstart.py:smok: the only variant is :smoke."),
        ([QUICKSTART, "--workdr=x"], "Unknown command line flag 'workdr'. Did you mean: workdir"),
        ([QUICKSTART, "--config.steps=abc"], "--config.steps=abc: invalid literal for int()"),
        ([QUICKSTART, "--workdir=README.md"], "/README.md/checkpoints'"),
        ([], "Flag --config must have a value"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments, message):
    done = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("train.py: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
