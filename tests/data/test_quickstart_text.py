"""The shipped text and tokenizer are what their README says."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from jet_jax.data import DataConfig, load_tokenizer, make_train_iterator, make_valid_batches

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"


def texts(name):
    with open(QUICKSTART / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


@pytest.fixture(scope="module")
def ids(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir, vocab_size=2048)
    found = {}
    for name in ("train", "valid"):
        encoded = [tokenizer.encode(text) for text in texts(name)]
        assert [tokenizer.decode(e) for e in encoded] == texts(name)
        found[name] = [np.append(e, tokenizer.eos_id) for e in encoded]
    return found


def test_counts_and_unigram_loss(ids):
    readme = (QUICKSTART / "README.md").read_text()
    for name in ("train", "valid"):
        size = sum(len(text.encode()) for text in texts(name))
        tokens = sum(map(len, ids[name]))
        assert f"| {len(ids[name])} | {size:,} | {tokens:,} |" in readme
    assert not set(texts("train")) & set(texts("valid"))
    targets = np.concatenate([e[1:] for e in ids["valid"]])
    counts = np.bincount(np.concatenate(ids["train"]), minlength=2048) + 1
    own = np.bincount(targets, minlength=2048)
    for frequencies in (counts, own):
        loss = -np.log((frequencies / frequencies.sum())[targets]).mean()
        assert f"{loss:.3f}" in readme


def test_batches_of_the_shipped_text(ids, tokenizer_dir):
    config = DataConfig(
        train=str(QUICKSTART / "train.jsonl"),
        valid=str(QUICKSTART / "valid.jsonl"),
        tokenizer=tokenizer_dir,
        seq_len=256,
        batch_size=16,
    )
    batch = next(make_train_iterator(config, vocab_size=2048))
    assert batch["loss_mask"].mean() > 0.9
    valid = make_valid_batches(config, vocab_size=2048)
    assert sum(b["loss_mask"].sum() for b in valid) == sum(len(e) - 1 for e in ids["valid"])


def test_make_reads_r_data():
    """Builds a small R database by its format and reads it back."""
    spec = importlib.util.spec_from_file_location("make_quickstart", QUICKSTART / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    lines = [
        "TITLE",
        "",
        "CHAPTER 1",
        "",
        "One",
        " two.",
        "",
        "Three",
        "Chapter 2",
        "Ende ü",
        "FINIS",
    ]

    def integers(*values):
        return b"".join(v.to_bytes(4, "big") for v in values)

    blob = b"X\n" + integers(3, 0x40201, 0x30500, 5) + b"UTF-8" + integers(16, len(lines))
    blob += b"".join(integers(9, len(line.encode())) + line.encode() for line in lines)
    number = b"X\n" + integers(2, 0x40201, 0x20300, 13, 1, 7)
    data = b""
    for raw, kind, pack in (
        (blob, b"", make.zlib.compress),
        (number, b"2", make.bz2.compress),
        (blob, b"Z", make.lzma.compress),
    ):
        data += integers(len(raw)) + kind + pack(raw)
    found = [make.character_vector(record) for record in make.records(data)]
    assert found == [lines, [], lines]
    chapters = list(make.chapters(lines))
    assert chapters == [(1, "Chapter 1\n\nOne two.\n\nThree"), (2, "Chapter 2\n\nEnde ü")]


def test_the_licence_lies_beside_the_text():
    licence = (QUICKSTART / "LICENSE.janeaustenr").read_bytes()
    assert b"MIT License" in licence and b"Julia Silge" in licence
