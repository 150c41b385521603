"""The Triton walk beside the Pallas one: what needs no GPU."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "triton_walk.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmarks_triton_walk", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_says_in_one_line_what_is_missing(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "jax_triton", None)
    for arguments in ([], ["--lower"]):
        script.main(arguments)
        out = capsys.readouterr().out
        assert out.startswith("triton_walk: skipped: jax-triton is not installed")
        assert out.count("\n") == 1


def test_says_that_it_needs_a_gpu(script, capsys, monkeypatch):
    monkeypatch.setattr(script, "jax_triton", object())
    script.main([])
    assert capsys.readouterr().out == "triton_walk: skipped: TMA needs a Hopper GPU; this is cpu\n"


@pytest.mark.parametrize("wrong", (["--length", "100"], ["--value", "96"]))
def test_refuses_sizes_that_blocks_do_not_divide(script, capsys, wrong):
    with pytest.raises(SystemExit):
        script.main(wrong)
    assert "must be a multiple of 64" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ("output", "states", "final", "homogeneous"))
@pytest.mark.parametrize("key_width", (64, 96, 128))
def test_compiles_without_a_gpu(script, kind, key_width):
    """The module holds the compiled kernel, one call, and no more results than the kind's."""
    pytest.importorskip("jax_triton")
    pytest.importorskip("jax_cuda12_plugin")
    text = script.lower(kind, 1, 256, 2, key_width, 128)
    assert text.count("@triton_kernel_call_ffi") == 1
    results = {"output": 2, "states": 3}.get(kind, 1)
    (public,) = [line for line in text.splitlines() if "func.func public" in line]
    assert public.split("->")[1].count("tensor<") == results
