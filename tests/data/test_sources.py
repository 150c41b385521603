"""Documents of local files: what is found, read, left out and refused."""

import gzip
import json
import pickle

import pytest
import zstandard

from jet_jax.data import TextSource, find_files

ROWS = [{"text": "first ünï"}, {"text": "  \n"}, {"text": "second\nline"}, {"text": "third"}]
TEXTS = ["first ünï", "second\nline", "third"]
JSONL = "\n".join(json.dumps(row) for row in ROWS).encode() + b"\n\n"


def read(*patterns, **options):
    source = TextSource([str(p) for p in patterns], **options)
    return [source[i] for i in range(len(source))]


def zstd(data):
    """Two frames, as concatenated files have."""
    half = len(data) // 2
    return b"".join(zstandard.ZstdCompressor().compress(d) for d in (data[:half], data[half:]))


@pytest.mark.parametrize(
    ("name", "pack"), [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd)]
)
def test_jsonl_plain_and_compressed(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(JSONL))
    source = TextSource([str(tmp_path / name)])
    copy = pickle.loads(pickle.dumps(source))  # as worker processes get it
    assert [source[i] for i in range(len(source))] == TEXTS
    assert [copy[i] for i in (2, 0, 1)] == [TEXTS[2], TEXTS[0], TEXTS[1]]
    with pytest.raises(IndexError):
        source[3]


def test_decompressed_copies_go_with_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL))
    source = TextSource([str(tmp_path / "a.jsonl.gz")])
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    del source
    assert not list((tmp_path / "tmp").iterdir())


def test_text_key(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n\n{"body": "y", "text": 1}')
    assert read(tmp_path / "a.jsonl", text_key="body") == ["x", "y"]


@pytest.mark.parametrize(
    ("separator", "expected"),
    [
        ("\n\n\n", ["\ta b\n\nc", "d", "e"]),
        ("\n\n", ["\ta b", "c", "d", "e"]),
        ("", ["\ta b\n\nc\n\n\n\n\nd\n\n\n  \n\n\ne"]),
        ("c", ["\ta b", "d\n\n\n  \n\n\ne"]),
    ],
)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_txt_separators(tmp_path, separator, expected, newline):
    text = "\ufeff\n\ta b\n\nc\n\n\n\n\nd\n\n\n  \n\n\ne\n"
    (tmp_path / "a.txt").write_bytes(text.replace("\n", newline).encode())
    assert read(tmp_path / "a.txt", doc_separator=separator) == expected


def test_files_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/1.jsonl.gz", "b/c/3.txt.zst", "b/notes.md", "a.txt", "z[1].txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()

    def names(*patterns):
        found = find_files([f"{tmp_path}/{p}" for p in patterns])
        return [str(f)[len(str(tmp_path)) + 1 :] for f in found]

    assert names("b") == ["b/1.jsonl.gz", "b/2.txt", "b/c/3.txt.zst"]
    assert names("b/2.txt", "*.txt", "b") == [
        "b/2.txt", "a.txt", "z[1].txt", "b/1.jsonl.gz", "b/c/3.txt.zst"]  # fmt: skip
    assert names("**/*.zst") == ["b/c/3.txt.zst"]
    assert names("z[1].txt") == ["z[1].txt"]
    with pytest.raises(ValueError, match=r"unknown file type: .*notes\.md; text files end in"):
        names("b/*")
    with pytest.raises(ValueError, match=r"no files match '.*/nothing\*'"):
        names("nothing*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no text files in the folder"):
        names("empty")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", r"no documents in .*a\.jsonl"),
        ("a.txt", b" \n\n\n\n ", r"no documents in .*a\.txt"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"', r"a\.jsonl, line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n["text"]', r"line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"b": 1, "a": 2}', r"line 1: no key 'text' \(keys: a, b\); set data.text_k"),
        ("a.jsonl", b'{"text": null}', r"line 1: 'text' is not a string but NoneType"),
        ("a.jsonl", b'{"text": "\xff"}', r"line 1: not valid UTF-8"),
        ("a.txt", b"abc\n\n\nd\xffe", r"a\.txt: not valid UTF-8 at byte 7"),
        ("a.txt.gz", gzip.compress(JSONL)[:-9], r"a\.txt\.gz: cannot be decompressed"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: cannot be decompressed"),
        ("a.txt.zst", zstd(JSONL)[:-1], r"a\.txt\.zst: .*truncated"),
        ("a.txt.zst", b"plain", r"a\.txt\.zst: cannot be decompressed"),
    ],
    ids=lambda value: "data" if isinstance(value, bytes) else value,
)
def test_refused_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        TextSource([str(tmp_path / name)])


def test_a_file_that_changed_is_noticed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(JSONL)
    source = TextSource([str(path)])
    path.write_bytes(JSONL[:30])
    with pytest.raises(ValueError, match=r"a\.jsonl, byte \d+ \(was the file changed\?\)"):
        source[2]
