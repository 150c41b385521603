"""The scripts that compare blocks with PyTorch's, with processes that only print."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from jet_jax.bench import blocks

FOLDER = Path(__file__).parent.parent / "benchmarks"
REAL = {block.name: block for block in blocks.all_blocks()}


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layer(name, ms, size="b8-t4096-grad", **more):
    sizes = {"B": 8, "T": 4096}
    rate = None if ms is None else 1e3 * 8 * 4096 / ms
    result = {"name": f"{name}-{size}", "op": "layer", "sizes": sizes, "ms": ms, "tokens_s": rate}
    return result | {"note": None if ms else "out of memory"} | more


def step(ms):
    return {
        "name": "gla-step-b128",
        "op": "decoding step",
        "sizes": {"B": 128},
        "implementation": "pallas",
        "ms": ms,
        "floor_ms": 0.1,
        "gb_s": 2500.0,
        "error": 1e-3,
        "note": None,
    }


def printing(*said, then=""):
    lines = "".join(f"print({json.dumps(json.dumps(x))}, flush=True)\n" for x in said)
    return [sys.executable, "-S", "-c", lines + then]


def test_a_process_is_read_line_by_line():
    tool = script("blocks")
    quiet = [*tool.stream(printing({"a": 1}, {"b": 2}, then="print('noise')"), 60)]
    assert quiet == [{"a": 1}, {"b": 2}, {"end": None, "late": False}]
    *said, end = tool.stream(printing({"a": 1}, then="raise SystemExit('no card')"), 60)
    assert said == [{"a": 1}]
    assert end == {"end": "ended with status 1: no card", "late": False}
    *said, end = tool.stream(printing({"a": 1}, then="import time; time.sleep(60)"), 1)
    assert said == [{"a": 1}] and end == {"end": "stopped after 1 s", "late": True}


def test_a_run_is_resumed(tmp_path, monkeypatch, capsys):
    tool = script("blocks")
    started = []

    def command(block, side, repeats, folder):
        started.append((block.name, side))
        said = layer(block.name, 2.0 if side == "torch" else 1.0, implementation=side, error=1e-3)
        hangs = len(started) == 2
        return printing(
            {"start": {"device": "card"}}, said, then="import time; time.sleep(60)" if hangs else ""
        )

    monkeypatch.setattr(tool, "command", command)
    monkeypatch.setattr(tool, "LEAST", 1)
    path = tmp_path / "out.json"
    words = ["blocks.py", str(path), "--blocks", "gdn", "jet", "--sides", "pallas", "torch"]
    monkeypatch.setattr(sys, "argv", [*words, "--seconds", "4"])
    tool.main()
    # The second hung until the time was up: what it had measured is kept, and the third waits.
    assert started == [("gdn", "pallas"), ("gdn", "torch")]
    out = capsys.readouterr().out
    assert "goes on: gdn (torch), jet (pallas)" in out
    assert "| `gdn` | B8 T4096 | 32,768,000 | 16,384,000 | 2.00 | 1.00 | 1.00 | 1.00 |" in out

    monkeypatch.setattr(sys, "argv", words)
    tool.main()
    assert started[2:] == [("gdn", "torch"), ("jet", "pallas")]  # the JetBlock has no peer
    assert "not measured yet" not in capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["blocks"]["jet"]["sides"]["pallas"]["done"]
    tool.main()
    assert len(started) == 4  # nothing is left


def test_the_table_takes_the_faster_of_ours():
    tool = script("blocks")
    forward = layer("gla", 1.0, "b8-t4096", implementation="xla", error=1e-3)
    slow = layer("gla", 8.0, implementation="xla", error=2e-3)
    fast = layer("gla", 4.0, implementation="pallas", error=3e-3)
    failed = layer("rwkv7", None, implementation="pallas")
    of = {
        "gla": {"xla": [forward, slow], "pallas": [fast, step(0.12)], "torch": [layer("gla", 5.0)]},
        "gdn": {"pallas": [layer("gdn", 8.0, implementation="pallas", error=1e-3)]},
        "rwkv7": {"pallas": [failed]},
    }
    report = {"blocks": {}}
    for name, sides in of.items():
        found = {side: {"results": results} for side, results in sides.items()}
        report["blocks"][name] = REAL[name].facts() | {"sides": found}
    lines = tool.markdown(report).splitlines()
    assert (
        "| `gla` | B8 T4096 | 8,192,000 | 6,553,600 | 1.25 | 2.00 |  | 1.07 | 1.000 |  | 3.0e-03 "
        "| pallas |" in lines
    )
    assert "| `rwkv7` | B8 T4096 |  |  |  |  |  | 0.50 |  |  |  | out of memory |" in lines
    assert "| `gla` B128 | 4×192×384 | pallas | 0.1200 | 0.1000 | 1.20× | 2500 | 1.0e-03 |" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "OUT.json is missing"),
        (["missing/x.json"], "does not exist"),
        (["x.json", "--blocks", "attn"], "no block is called 'attn'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["blocks.py", *arguments])
    with pytest.raises(SystemExit) as error:
        script("blocks").main()
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_peers_get_our_options(monkeypatch):
    layers = mock.MagicMock()
    for name, module in (("torch", mock.MagicMock()), ("fla", mock.MagicMock())):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "torch.nn", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "torch.nn.functional", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "peer_fla", mock.MagicMock())
    monkeypatch.setitem(sys.modules, "fla.layers", layers)
    sys.modules["fla"].layers = layers
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script takes its folder out
    peer = script("peer_fla_blocks")
    assert set(peer.LAYERS) == set(REAL) - {"jet"}
    peer.make_layer("rwkv7", 1536, REAL["rwkv7"].options)
    layers.RWKV7Attention.assert_called_once_with(
        hidden_size=1536, head_dim=192, fuse_norm=True, layer_idx=1, num_hidden_layers=2
    )


@pytest.mark.parametrize("name", sorted(set(REAL) - {"mamba2"}))
def test_resized_blocks_keep_their_rows(name):
    plot = script("plot_blocks")
    found = plot.resized(REAL[name])
    assert REAL[name] in found and len(found) >= 5
    heads, key, value = REAL[name].state_shape
    for block in found:
        h, k, v = block.state_shape
        assert (h * k, h * v) == (heads * key, heads * value)
    sizes = sorted(block.state_elements for block in found)
    assert sizes[0] < REAL[name].state_elements < sizes[-1]


def test_figures_are_drawn(tmp_path, monkeypatch, capsys):
    plot = script("plot_blocks")
    monkeypatch.setattr(sys, "argv", ["plot_blocks.py", "--folder", str(tmp_path)])
    plot.main()
    assert (tmp_path / "blocks_cost.png").read_bytes().startswith(b"\x89PNG")
    found = {
        "pallas": {"start": {"device": "card"}, "results": [layer("gla", 4.0), step(0.12)]},
        "xla": {"start": {"device": "card"}, "results": [layer("gla", 8.0)]},
        "torch": {"start": None, "results": [layer("gla", 5.0)]},
    }
    report = {"blocks": {"gla": {"sides": found}}}
    assert plot.layer_rates(report) == {
        "B8 T4096": {("gla", "ours"): 8_192_000, ("gla", "torch"): 6_553_600}
    }
    assert plot.step_times(report) == {"gla": (120, 100)}
    path = tmp_path / "out.json"
    path.write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["plot_blocks.py", str(path), "--folder", str(tmp_path)])
    plot.main()
    assert (tmp_path / "blocks_measured.png").read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps({"blocks": {}}))
    with pytest.raises(SystemExit):
        plot.main()
    assert "no layer's time is in the file" in capsys.readouterr().err


def test_a_described_block_is_what_the_peer_reads(tmp_path):
    block = dataclasses.replace(REAL["rwkv7"])
    *_, path = script("blocks").command(block, "torch", 5, tmp_path)
    described = json.loads(Path(path).read_text())
    assert described["sizes"] == [{"B": 8, "T": 4096}, {"B": 1, "T": 65536}]
    assert described["shared"] == {"v_first": 1536}
    assert described["options"] == {"head_dim": 192, "fuse_norm": True}
