"""Makes the quick-start text and its tokenizer from the R package janeaustenr.

Run it with the file `data/Rdata.rdb` of an installed or unpacked janeaustenr 1.0.0:

    python data/quickstart/make.py PATH/TO/janeaustenr/data/Rdata.rdb

It writes train.jsonl, valid.jsonl and tokenizer/ beside itself. Only the standard library and
`tokenizers` are needed (no R). The result does not depend on the machine.
"""

import bz2
import json
import lzma
import re
import struct
import sys
import zlib
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).parent
NOVELS = ("PRIDE AND PREJUDICE", "NORTHANGER ABBEY", "PERSUASION")
VALID_EVERY = 20  # one chapter in twenty is held out
VOCAB_SIZE = 2048
END = "<|endoftext|>"
CHAPTER = re.compile(r"chapter (\d+)", re.IGNORECASE)
# What follows the last line of a novel: its closing mark, then an editor's note.
CLOSING = re.compile(r"(the end|finis|\*?a note on the text.*)", re.IGNORECASE)


def records(data: bytes):
    """Yields the serialized objects of an R lazy-load database, decompressed.

    A record is its size (4 bytes, big-endian), then zlib data, or "2" and bzip2 data, or "Z" and
    xz data; its compressed length is known only by decompressing it.
    """
    position = 0
    while position < len(data):
        kind = data[position + 4 : position + 5]
        if kind == b"2":
            start, codec = position + 5, bz2.BZ2Decompressor()
        elif kind == b"Z":
            start, codec = position + 5, lzma.LZMADecompressor()
        else:
            start, codec = position + 4, zlib.decompressobj()
        yield codec.decompress(data[start:])
        position = len(data) - len(codec.unused_data)


def character_vector(blob: bytes) -> list[str]:
    """Reads a character vector in R's XDR serialization, [] if `blob` holds another type."""
    position = 2 + 4  # the format's mark "X\n" and version
    (version,) = struct.unpack_from(">i", blob, 2)
    position += 8  # the versions of R that wrote it and that can read it
    if version == 3:
        (size,) = struct.unpack_from(">i", blob, position)
        position += 4 + size  # the native encoding's name
    flags, count = struct.unpack_from(">ii", blob, position)
    if flags & 0xFF != 16:  # STRSXP
        return []
    position += 8
    lines = []
    for _ in range(count):
        _, size = struct.unpack_from(">ii", blob, position)  # flags and length of a CHARSXP
        position += 8
        lines.append(blob[position : position + size].decode("utf-8"))
        position += size
    return lines


def chapters(lines: list[str]):
    """Yields (number, text) of each chapter, with paragraphs unwrapped to one line each."""
    number, paragraphs, paragraph = 0, [], []
    for line in [*lines, "", "Chapter 0"]:
        line = line.strip()
        heading, closing = CHAPTER.fullmatch(line), CLOSING.fullmatch(line)
        if line and not heading and not closing:
            paragraph.append(line)
            continue
        if paragraph:
            paragraphs.append(" ".join(" ".join(paragraph).split()))
            paragraph = []
        if heading or closing:
            if number and paragraphs:
                yield number, "\n\n".join([f"Chapter {number}", *paragraphs])
            number, paragraphs = (int(heading[1]) if heading else 0), []


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, so that any text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def main(path: str) -> None:
    novels = {}
    for blob in records(Path(path).read_bytes()):
        lines = character_vector(blob)
        if lines and lines[0].strip().upper() in NOVELS:
            novels[lines[0].strip().upper()] = lines
    documents = [
        {"title": name.title().replace(" And ", " and "), "chapter": number, "text": text}
        for name in NOVELS
        for number, text in chapters(novels[name])
    ]
    held_out = [d for i, d in enumerate(documents) if i % VALID_EVERY == VALID_EVERY // 2]
    kept = [d for d in documents if d not in held_out]
    for name, part in (("train", kept), ("valid", held_out)):
        rows = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in part)
        (HERE / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        print(f"{name}: {len(part)} chapters, {sum(len(d['text'].encode()) for d in part)} bytes")
    (HERE / "tokenizer").mkdir(exist_ok=True)
    train_tokenizer([d["text"] for d in kept]).save(str(HERE / "tokenizer" / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1000000,
    }
    (HERE / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
