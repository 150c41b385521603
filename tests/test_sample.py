"""`jet-jax sample` on a tiny model with the quick start's tokenizer."""

import json
from pathlib import Path

import jax
import pytest
from flax import nnx
from tiny import tiny_config

import jet_jax
from jet_jax import continuations
from jet_jax.cli import main
from jet_jax.continuations import Continuations, document_head
from jet_jax.data.sources import TextSource
from jet_jax.data.tokenizer import load_tokenizer
from jet_jax.models.lm import HybridLM

DATA = Path(__file__).parents[1] / "data" / "quickstart"
DOCUMENTS = str(DATA / "valid.jsonl")
GROUP, ROWS, TOKENS = 4, 7, 24


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DATA / "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    attention = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}
    config = tiny_config(
        vocab_size=2048,
        initializer_range=0.3,
        layer_types=("attn",),
        mixers={"attn": attention},
    )
    path = tmp_path_factory.mktemp("models") / "model"
    jet_jax.save(HybridLM(config, rngs=nnx.Rngs(0)), path, tokenizer_dir=DATA / "tokenizer")
    return path


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(continuations, "GROUP", GROUP)


def command(folder, out, rows=ROWS, **changes):
    options = {"documents": DOCUMENTS, "tokens": TOKENS, "head": "3-6", "batch": 2, "seed": 5}
    options |= {"out": out, "rows": rows} | changes
    words = [str(w) for name, value in options.items() for w in (f"--{name}", value)]
    return ["sample", str(folder), *words]


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "samples.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continuations, "GROUP", GROUP)
        assert main(command(folder, out)) == 0
    return out


def test_rows_continue_the_beginnings_of_documents(whole, folder, tokenizer):
    rows, documents = texts(whole), TextSource([DOCUMENTS])
    assert len(rows) == ROWS == len(documents) + 1
    wanted = Continuations(TOKENS, (3, 6), 1.0, 5)
    heads = [document_head(wanted, i, documents, tokenizer) for i in range(ROWS)]
    lengths = {len(head) - tokenizer.adds_bos for head in heads}
    assert lengths <= set(range(3, 7)) and len(lengths) > 1
    model = jet_jax.load(folder, dtype="float32")
    for first in (0, GROUP):
        key = jax.random.fold_in(jax.random.key(5), first // GROUP)
        some = heads[first : first + GROUP]
        new = jet_jax.generate(model, some, TOKENS - 3, 1.0, key=key, lanes=2)
        want = [tokenizer.decode((h + n)[:TOKENS]) for h, n in zip(some, new, strict=True)]
        assert rows[first : first + GROUP] == want
    assert all(len(r) > len(tokenizer.decode(h)) for r, h in zip(rows, heads, strict=True))


@pytest.mark.parametrize("kept", [1, 5, 7])
def test_a_killed_run_goes_on_with_the_same_rows(whole, folder, tmp_path, kept):
    out = tmp_path / "samples.jsonl"
    lines = whole.read_bytes().splitlines(keepends=True)
    half = lines[kept][:9] if kept < ROWS else b""  # a line that the kill cut off
    out.write_bytes(b"".join(lines[:kept]) + half)
    settings = whole.with_suffix(".settings.json")
    out.with_suffix(".settings.json").write_bytes(settings.read_bytes())
    assert main(command(folder, out)) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_more_rows_are_added(whole, folder, tmp_path):
    out = tmp_path / "samples.jsonl"
    assert main(command(folder, out, rows=2)) == 0
    assert texts(out) == texts(whole)[:2]
    assert main(command(folder, out, rows=ROWS)) == 0
    assert out.read_bytes() == whole.read_bytes()


def test_train_reads_the_file(whole):
    assert [TextSource([str(whole)])[i] for i in range(ROWS)] == texts(whole)
    assert TextSource([str(whole.parent)])[0] == texts(whole)[0]  # the settings are no text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 6}, "is of other settings (seed 5 there, 6 here)"),
        ({"head": "3-7", "temperature": 0.5}, "head [3, 6] there, [3, 7] here; temperature 1.0"),
        ({"documents": DATA / "train.jsonl"}, "is of other settings (documents [6, "),
        ({"rows": 0}, "--rows 0 must be at least 1"),
        ({"batch": 600}, "--batch 600 must be at most 512"),
        ({"head": "9-6"}, "head=9-6: give the least and the most"),
        ({"tokens": 6}, "tokens=6 leaves nothing to write after a head of 6"),
        ({"temperature": -1}, "temperature=-1.0"),
        ({"documents": "none.jsonl"}, "no files match"),
        ({"out": "samples.txt"}, "samples.txt must end in .jsonl"),
    ],
)
def test_what_cannot_be_is_said_before_the_weights_are_read(
    whole, folder, changes, message, capsys, monkeypatch
):
    def load(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("jet_jax.io.load", load)
    before = whole.read_bytes()
    out = changes.get("out", whole)
    changes = {name: value for name, value in changes.items() if name != "out"}
    assert main(command(folder, out, **changes)) == 1
    error = capsys.readouterr().err
    assert error.startswith("jet-jax sample: error: ") and message in error
    assert whole.read_bytes() == before


def test_a_file_of_unknown_origin_is_left_alone(folder, tmp_path, capsys):
    out = tmp_path / "mine.jsonl"
    out.write_text('{"text": "mine"}\n')
    assert main(command(folder, out)) == 1
    assert "mine.settings.json, which tells how it was made, is not" in capsys.readouterr().err
    assert out.read_text() == '{"text": "mine"}\n'
    with pytest.raises(SystemExit):
        main(command(folder, out, head="few"))
    assert "expected two numbers" in capsys.readouterr().err


def test_documents_come_in_another_order_each_round(tokenizer):
    documents = [f"{i} and so on, on and on and on and on" for i in range(20)]
    wanted = Continuations(16, (6, 9), seed=1)
    heads = [document_head(wanted, i, documents, tokenizer) for i in range(40)]
    numbers = [int(tokenizer.decode(head).split()[0]) for head in heads]
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(20))
    assert numbers[:20] != numbers[20:]
    assert {len(head) - tokenizer.adds_bos for head in heads} == {6, 7, 8, 9}
