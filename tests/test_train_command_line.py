"""Mistakes on `train.py`'s command line: each is one line that names the thing, no traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jet_jax import command_line

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"
# Runs train.py for one list of arguments after another, each in a process of its own that has
# imported already what train.py imports: that alone takes seconds.
RUN_EACH = """
import ast, json, os, runpy, sys
sys.path[0] = os.getcwd()
tree = ast.parse(open("train.py").read())
tree.body = [x for x in tree.body if isinstance(x, (ast.Import, ast.ImportFrom))]
exec(compile(tree, "train.py", "exec"), {})
folder, runs = sys.argv[1], json.loads(sys.argv[2])
for i, arguments in enumerate(runs):
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        open(f"{folder}/{i}.code", "w").write(str(code))
        continue
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{i}.{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["train.py", *arguments]
    runpy.run_path("train.py", run_name="__main__")
    break
"""
MISTAKES = [
    (["--config=configs/nope.py"], "no config file configs/nope.py; the current folder is"),
    ([QUICKSTART + ":smok"], "configs/quickstart.py:smok: the only variant is :smoke."),
    ([QUICKSTART, "--workdr=x"], "Unknown command line flag 'workdr'. Did you mean: workdir"),
    ([QUICKSTART, "--config.steps=abc"], "--config.steps=abc: invalid literal for int()"),
    ([QUICKSTART, "--workdir=README.md"], "/README.md/checkpoints'"),
    ([], "Flag --config must have a value"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What each run of MISTAKES returned (N.code) and wrote (N.err)."""
    folder = tmp_path_factory.mktemp("runs")
    subprocess.run(
        [sys.executable, "-c", RUN_EACH, folder, json.dumps([x for x, _ in MISTAKES])],
        cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, check=True, timeout=300,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_told_in_a_line(folder, arguments, message):
    run = MISTAKES.index((arguments, message))
    assert (folder / f"{run}.code").read_text() == "1"
    error = (folder / f"{run}.err").read_text()
    assert error.startswith("train.py: error: ") and message in error
    assert error.count("\n") == 1, error


def test_lack_of_memory_names_the_settings_that_need_less():
    def fail(text):
        with command_line.memory_errors("train.py", "Less memory: remat."):
            raise jax.errors.JaxRuntimeError(text)

    with pytest.raises(SystemExit, match="^train.py: error: RESOURCE_EXHAUSTED: 44 GiB\nLess"):
        fail("RESOURCE_EXHAUSTED: 44 GiB\nand where it was asked for")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fail("INTERNAL: something else")
