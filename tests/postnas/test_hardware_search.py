"""The hardware-aware search: grids, reshaped hybrids, measured speed, fronts and the choice."""

import json

import jax
import pytest

from jet_jax.postnas import measuring
from jet_jax.postnas.hardware_search import (
    Shape,
    check_shapes,
    choose,
    grid,
    measure,
    pareto,
    plot,
    shape_of,
    shaped,
    table,
)
from tests.tiny import tiny_config

# arXiv 2508.15884, table 2: decoding tokens/s, retrieval, math.
PAPER = {
    (256, 288, 4): (2969, 67.6, 31.3),
    (192, 384, 4): (2961, 69.3, 32.3),
    (128, 576, 4): (2979, 69.5, 32.5),
    (256, 144, 8): (2986, 68.3, 32.1),
    (192, 192, 8): (2970, 70.6, 32.8),
    (128, 288, 8): (2971, 69.6, 33.2),
    (128, 192, 12): (2959, 68.8, 32.9),
    (96, 256, 12): (2955, 69.6, 34.8),
    (64, 384, 12): (2952, 70.1, 34.2),
}
ROWS = [
    {"shape": Shape(*shape), "decode_tokens_s": speed, "retrieval": retrieval, "math": math}
    for shape, (speed, retrieval, math) in PAPER.items()
]
SIZES = {"context": 64, "batch": 2, "prefill_length": 24, "chunk": 16, "repeats": 1}


def small_hybrid(dtype="float32"):
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    gdn = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0}
    return tiny_config(
        layer_types=("gdn", "attn"), mixers={"gdn": gdn, "attn": attention}, dtype=dtype
    )


def test_the_papers_grid():
    assert grid(294_912, (4, 8, 12)) == list(PAPER)


def test_small_grids():
    small = grid(36_864, (3, 6, 9), max_key=128, max_key_width=576)
    assert [
        str(s) for s in small[:6]
    ] == "128-96-3 96-128-3 64-192-3 96-64-6 64-96-6 48-128-6".split()
    assert small[6:8] == [(64, 64, 9), (32, 128, 9)]
    assert {s.product for s in small} == {36_864}
    assert grid(36_864, (9,), per_heads=1) == [(128, 32, 9)]
    assert grid(36_864, (9,), per_heads=1, max_key=64) == [(64, 64, 9)]
    assert all(s.key % 32 == 0 == s.value % 32 for s in grid(36_864, (3, 6, 9), multiple=32))
    with pytest.raises(ValueError, match=r"heads=5 has product=36,864"):
        grid(36_864, (3, 5))


def test_explicit_lists():
    shapes = check_shapes(36_864, ["64-64-9", (32, 128, 9), "48/128/6"])
    assert shapes == [(64, 64, 9), (32, 128, 9), (48, 128, 6)]
    with pytest.raises(ValueError, match=r"64-64-8.* 32,768 elements, not 36,864"):
        check_shapes(36_864, ["64-64-9", "64-64-8"])
    for bad in ("64-64", "64-0-9", "a-b-c", (1, 2)):
        with pytest.raises(ValueError, match="is no shape"):
            Shape.of(bad)


@pytest.mark.parametrize("shape", [*PAPER, (80, 112, 9), (48, 208, 9)])
def test_shaped_is_exact(shape):
    """Also for the code that truncates head_dim·expand_v and num_heads·head_dim·expand_v."""
    mixers = {"jet": {"num_heads": 1, "head_dim": 8}, "gdn": {"num_heads": 1, "num_v_heads": 2}}
    config = tiny_config(layer_types=("jet", "gdn"), mixers=mixers)
    for kind in ("jet", "gdn"):
        new = shaped(config, kind, shape)
        assert shape_of(new, kind) == shape and new.layer_types == config.layer_types
        other = {"jet": "gdn", "gdn": "jet"}[kind]
        assert new.options(other) == config.options(other)
        options = new.options(kind)
        key, value, heads = shape
        assert int(options.head_dim * options.expand_v) == value
        assert int(heads * options.head_dim * options.expand_v) == heads * value


def test_shaped_says_what_is_wrong():
    config = small_hybrid()
    with pytest.raises(ValueError, match="no num_heads, head_dim and expand_v"):
        shaped(config, "attn", (8, 8, 2))
    with pytest.raises(ValueError, match="no options for layer type 'jet'"):
        shaped(config, "jet", (8, 8, 2))


def test_measure(tmp_path, monkeypatch):
    """Positive numbers; a kept result counts until the shape, or anything else, is another."""
    config = small_hybrid()
    calls = []

    def counted(call, repeats):
        calls.append(repeats)
        return timed(call, repeats)

    timed = measuring.median_seconds
    monkeypatch.setattr(measuring, "median_seconds", counted)
    first = measure(config, directory=tmp_path, **SIZES)
    assert first["decode_tokens_s"] > 0 and first["prefill_tokens_s"] > 0
    assert first["note"] is None and len(calls) == 2
    assert first["cache_bytes"] == config.cache_bytes(64, 2)
    assert json.loads(json.dumps(first)) == first

    assert measure(config, directory=tmp_path, **SIZES) == first and len(calls) == 2
    monkeypatch.setattr(measuring, "median_seconds", lambda call, repeats: calls.append(0) or 2.0)
    assert measure(config, directory=tmp_path, **SIZES) == first and len(calls) == 2
    other = measure(shaped(config, "gdn", (16, 8, 2)), directory=tmp_path, **SIZES)
    assert len(calls) == 4 and len(list(tmp_path.iterdir())) == 2
    # 16 tokens of 2 sequences, one prompt of 24, each in the 2 seconds that were faked.
    assert other["decode_tokens_s"] == 16 and other["prefill_tokens_s"] == 12
    measure(config, directory=tmp_path, **SIZES | {"context": 65})
    assert len(calls) == 6 and len(list(tmp_path.iterdir())) == 3
    fresh = measure(config, directory=tmp_path, again=True, **SIZES)
    assert fresh["decode_tokens_s"] == 16 and len(calls) == 8
    assert measure(config, directory=tmp_path, **SIZES) == fresh and len(calls) == 8
    with pytest.raises(ValueError, match="batch=0"):
        measure(config, **SIZES | {"batch": 0})


def test_decoding_is_measured_at_the_context(monkeypatch):
    """Every timed call begins with a cache of that length, and prefill with an empty one."""
    functions, params = measuring._random_model(small_hybrid())
    seen = {"decode": [], "prefill": []}
    runs = {name: getattr(functions, name) for name in seen}
    for name, run in runs.items():

        def spy(weights, cache, *args, run=run, name=name, **kwargs):
            seen[name].append((cache.length.tolist(), cache.layers[1].k.shape[1]))
            return run(weights, cache, *args, **kwargs)

        monkeypatch.setattr(functions, name, spy)

    def twice(call, repeats):
        for _ in range(2):
            jax.block_until_ready(call())
        return 1.0

    monkeypatch.setattr(measuring, "median_seconds", twice)
    assert measuring.decode_rate(functions, params, 64, 2, 1) == 2 * measuring.STEPS
    assert measuring.prefill_rate(functions, params, 24, 16, 2, 1) == 48
    assert seen["decode"] == [([64, 64], 64 + measuring.STEPS)] * 2
    assert seen["prefill"] == [([0, 0], 32), ([16, 16], 32)] * 2


def test_out_of_memory_is_a_note(tmp_path, monkeypatch):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(measuring, "decode_rate", full)
    monkeypatch.setattr(measuring, "prefill_rate", lambda *_: 7.0)
    result = measure(small_hybrid(), directory=tmp_path, **SIZES)
    assert result["decode_tokens_s"] is None and result["prefill_tokens_s"] == 7
    assert result["note"] == "decode: out of memory" and not list(tmp_path.iterdir())
    monkeypatch.setattr(measuring, "_random_model", full)
    result = measure(small_hybrid(), directory=tmp_path, **SIZES)
    assert result["note"] == "weights: out of memory" and result["prefill_tokens_s"] is None

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(measuring, "_random_model", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measure(small_hybrid(), **SIZES)


def test_the_papers_choice():
    """Math alone chose 96-256-12; so does the mean of z-scores, 1.137 against 1.129 of 64-384-12.

    Retrieval alone gives 192-192-8.
    """
    choice = choose(ROWS)
    assert ROWS[choice.index]["shape"] == (96, 256, 12) and not choice.dropped
    best = {name: ROWS[i]["shape"] for name, i in choice.by_objective.items()}
    assert best == {"math": (96, 256, 12), "retrieval": (192, 192, 8)}
    assert round(choice.scores[7], 3) == 1.137 and round(choice.scores[8], 3) == 1.129
    assert sorted(choice.scores)[-2:] == [choice.scores[8], choice.scores[7]]
    assert sum(choice.scores) == pytest.approx(0, abs=1e-9)
    # 2986 · 0.99 = 2956.1: the winner is among the two slowest.
    strict = choose(ROWS, tolerance=0.99)
    assert set(strict.dropped) == {7, 8} and strict.scores[7] is None
    assert ROWS[strict.index]["shape"] == (192, 192, 8)


def test_choose_at_its_edges():
    fast, slow = {"t": 100.0, "q": 1.0}, {"t": 97.9, "q": 9.0}
    assert choose([fast, slow], "t", objectives={"q": True}).index == 0
    assert choose([fast, slow | {"t": 98.0}], "t", objectives={"q": True}).index == 1
    failed = {"t": None, "note": "decode: out of memory"}
    choice = choose([failed, slow, fast], "t", objectives={"q": True})
    assert choice.index == 2 and choice.dropped[0] == "decode: out of memory"
    same = choose([fast, fast], "t", objectives={"q": True})
    assert same.index == 0 and same.scores == (0.0, 0.0)
    for rows, message in (
        ([failed], "no row has a 't'"),
        ([fast, {"t": 99.0}], "row 1 .* has q=None"),
        ([fast, {"t": 99.0, "q": float("nan")}], "q=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(rows, "t", objectives={"q": True})


def test_pareto():
    front = pareto(ROWS, {"decode_tokens_s": True, "math": True})
    assert [row["shape"] for row in front] == [
        (128, 576, 4),
        (256, 144, 8),
        (128, 288, 8),
        (96, 256, 12),
    ]
    points = [{"a": 1, "b": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 0}, {"a": None, "b": 5}]
    assert pareto(points, {"a": True, "b": True}) == points[:2]
    assert pareto(points, {"b": True}) == [points[3]]
    assert pareto(points, {"a": True, "b": False}) == [points[2]]


def test_table_and_picture(tmp_path):
    rows = [*ROWS, {"shape": Shape(48, 512, 12), "decode_tokens_s": None, "note": "out of memory"}]
    choice = choose(rows)
    text = table(rows, choice)
    assert "| **96-256-12** |  |  | **2,955** |  | **34.800** | **69.600** | **+1.14** |  |" in text
    assert "| 48-512-12 |  |  |  |  |  |  |  | out of memory |" in text
    assert text.endswith("by math alone 96-256-12; by retrieval alone 192-192-8.\n")
    lines = text.split("\n")
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    path = plot(rows, tmp_path / "new" / "front.svg", choice)
    picture = path.read_text()
    assert "<!-- math ↑ -->" in picture
    for row in ROWS:  # the labels are comments beside their glyphs
        assert picture.count(f"<!-- {row['shape']} -->") == 2
    assert "<!-- chosen -->" in picture and "<!-- 48-512-12 -->" not in picture


def test_where_less_is_better_the_value_itself_is_shown(tmp_path):
    rows = [
        {"shape": shape, "decode_tokens_s": 100.0 + i, "kl": kl}
        for i, (shape, kl) in enumerate({"8-8-4": 0.25, "16-8-2": 0.125, "8-16-2": 0.5}.items())
    ]
    objectives = {"kl": False}
    choice = choose(rows, tolerance=0.9, objectives=objectives)
    assert choice.index == choice.by_objective["kl"] == 1 and "of kl ↓" in choice.rule
    text = table(rows, choice, objectives=objectives)
    assert "| kl ↓ |" in text and "| **0.125** |" in text
    picture = plot(rows, tmp_path / "front.svg", choice, objectives=objectives).read_text()
    assert "<!-- kl ↓ -->" in picture and "<!-- 0.5 -->" in picture
    assert "<!-- −" not in picture  # no negative tick
