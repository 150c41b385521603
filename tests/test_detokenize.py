"""Text from a stream of ids: the same as decoding all at once, in whole characters."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from jet_jax.data.tokenizer import load_tokenizer
from jet_jax.detokenize import Detokenizer

QUICKSTART = Path(__file__).parents[1] / "data" / "quickstart" / "tokenizer"
TEXT = "Elinor's naïve café: 北京 🙂🏳️‍🌈 … Ünïcödé — “quoted”\n\n  two spaces."


def byte_fallback_decode():
    """The decoder of Llama's and Gemma's tokenizers: ▁ for a space, bytes as tokens of their own,
    the first space of a text dropped."""
    vocab = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁a", "▁the", "b", "é", "▁", "▁北"]
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(vocab)},
        "merges": [],
        "byte_fallback": True,
        "unk_token": "<unk>",
    }
    steps = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    decoder = {"type": "Sequence", "decoders": steps}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps({"model": model, "decoder": decoder}))
    return tokenizer.decode, len(vocab)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(QUICKSTART)


def stream(decode, ids, sizes, context=()):
    detokenizer = Detokenizer(decode, context)
    pieces, start = [], 0
    while start < len(ids):
        size = next(sizes)
        pieces.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*pieces, detokenizer.flush()]


def test_one_token_at_a_time_gives_whole_characters(tokenizer):
    ids = tokenizer.encode(TEXT).tolist()
    pieces = stream(tokenizer.decode, ids, iter(lambda: 1, 0))
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(ids) > len(TEXT)  # so some tokens are parts of a character
    assert all(piece == "" for piece in pieces[-1:])


@pytest.mark.parametrize("seed", [0, 1])
def test_any_tokens_give_what_decoding_all_gives(tokenizer, seed):
    """Random ids are mostly invalid UTF-8; 2,000 of them go through many windows."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, tokenizer.vocab_size, 2000).tolist()
    context = tokenizer.encode(TEXT).tolist()
    sizes = iter(lambda: int(rng.integers(1, 17)), 0)
    whole = tokenizer.decode(context + ids)[len(TEXT) :]
    assert "".join(stream(tokenizer.decode, ids, sizes, context)) == whole


@pytest.mark.parametrize("most_others", [0, 3])
def test_characters_of_several_byte_tokens(most_others):
    """Windows begin between characters, also within long runs of byte tokens."""
    decode, size = byte_fallback_decode()
    rng = np.random.default_rng(0)
    ids = []
    for i in rng.integers(0, 4, 700):
        ids += [1 + byte for byte in "é京🙂ß"[i].encode()]
        ids += rng.integers(257, size, rng.integers(0, most_others + 1)).tolist()
    context, ids = ids[:500], ids[500:]
    while ids[0] <= 256 and 0x80 <= ids[0] - 1 < 0xC0:  # the rest of a character
        context.append(ids.pop(0))
    sizes = iter(lambda: int(rng.integers(1, 17)), 0)
    whole = decode(context + ids)[len(decode(context)) :]
    assert "\ufffd" not in whole and len(whole) > 500
    assert "".join(stream(decode, ids, sizes, context)) == whole


def test_the_space_after_the_prompt_stays():
    decode, size = byte_fallback_decode()
    the, a = size - 5, size - 6
    assert decode([the]) == "the"
    assert stream(decode, [the, a], iter(lambda: 1, 0), context=[a]) == [" the", " a", ""]


def test_an_unfinished_character_comes_at_the_end():
    decode, _ = byte_fallback_decode()
    euro = [1 + byte for byte in "€".encode()]
    assert stream(decode, euro, iter(lambda: 1, 0)) == ["", "", "€", ""]
    assert stream(decode, euro[:2], iter(lambda: 1, 0))[:2] == ["", ""]
    assert set("".join(stream(decode, euro[:2], iter(lambda: 1, 0)))) == {"\ufffd"}
