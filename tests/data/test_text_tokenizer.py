"""Tokenizers from local folders."""

import json
import re

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jet_jax.data import check_vocab, load_tokenizer
from jet_jax.data.pack import Tokenize


@pytest.fixture
def bos_dir(tmp_path):
    """A tokenizer that puts <s> first by itself, has no end token and truncates to two ids."""
    words = {"<s>": 0, "[UNK]": 1, "a": 2, "b": 3, "c": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def test_shipped_tokenizer(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir, vocab_size=2048)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (2048, 0, None)
    assert not tokenizer.adds_bos
    text = 'It is a truth — "universally"  acknowledged\n\n☃'
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and 0 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, 0]) == text
    assert tokenizer.decode([*ids, 0], skip_special=False) == text + "<|endoftext|>"


def test_a_tokenizer_that_adds_bos(bos_dir):
    tokenizer = load_tokenizer(bos_dir)
    assert tokenizer.adds_bos and tokenizer.bos_id == 0 and tokenizer.eos_id is None
    assert tokenizer.encode("a b c").tolist() == [2, 3, 4]
    assert Tokenize.make(tokenizer, None, False).map("a b c").tolist() == [0, 2, 3, 4]
    assert Tokenize.make(tokenizer, False, False).map("a b c").tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="no eos token; name one in its tokenizer_config.json"):
        Tokenize.make(tokenizer, None, True)


def test_separators_around_a_document(tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    inner = tokenizer.encode("a chapter").tolist()
    assert Tokenize.make(tokenizer, None, True).map("a chapter").tolist() == [*inner, 0]
    assert Tokenize.make(tokenizer, None, False).map("a chapter").tolist() == inner
    with pytest.raises(ValueError, match="data.add_bos=True, but the tokenizer has no bos token"):
        Tokenize.make(tokenizer, True, True)


def test_refused_tokenizers(tokenizer_dir, tmp_path):
    message = f"{re.escape(tokenizer_dir)} has 2048 token ids, .*vocab_size is 2047"
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tokenizer_dir, vocab_size=2047)
    check_vocab(load_tokenizer(tokenizer_dir), 4096)
    with pytest.raises(ValueError, match="expected a folder with a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot load the tokenizer in"):
        load_tokenizer(tmp_path)
