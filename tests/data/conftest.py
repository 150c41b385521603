"""A small corpus of numbered documents and the shipped tokenizer."""

from pathlib import Path

import pytest

from jet_jax.data import DataConfig

QUICKSTART = Path(__file__).parents[2] / "data" / "quickstart"


@pytest.fixture(scope="session")
def tokenizer_dir():
    return str(QUICKSTART / "tokenizer")


@pytest.fixture(scope="session")
def texts():
    """24 documents that all differ, the longest of several windows."""
    words = "the of and a in that was it his her not had with".split()
    return [
        f"{i}: " + " ".join(words[(i * 7 + j * (i + 1)) % 13] for j in range(2 + (i * 5) % 23))
        for i in range(24)
    ]


@pytest.fixture
def make_config(tmp_path, tokenizer_dir, texts):
    """Returns a function from options to a DataConfig over `texts` (txt, a document a line)."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(texts))

    def make(**options):
        defaults = dict(train=(str(path),), valid=(str(path),), tokenizer=tokenizer_dir)
        defaults |= dict(doc_separator="\n", seq_len=12, batch_size=4, pack_rows=6, seed=3)
        return DataConfig(**(defaults | options))

    return make
