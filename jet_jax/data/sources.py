"""Random access to the documents of local text files.

`TextSource` reads every file once, when it is made, to find where its documents lie and that each
can be read; after that it holds 20 bytes a document and reads one document at a time from disk.
Compressed files are decompressed once into temporary files, deleted when the source goes.
"""

import glob
import json
import mmap
import os
import re
import weakref
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jet_jax.data import compressed

KINDS = (".txt", ".jsonl")
_BOM = b"\xef\xbb\xbf"


def file_kind(path: str) -> str | None:
    """Returns ".txt" or ".jsonl" by the name of a file, without .gz or .zst; None for others."""
    stem, suffix = os.path.splitext(path)
    if suffix in compressed.SUFFIXES:
        suffix = os.path.splitext(stem)[1]
    return suffix if suffix in KINDS else None


def find_files(patterns: Sequence[str]) -> tuple[str, ...]:
    """Lists the text files that files, folders and globs name, each once.

    A folder gives the text files in it and below it and leaves others out; a glob (`**` goes
    down) or a file must name text files only. The order is that of `patterns`, then of names.

    Raises:
      ValueError: a pattern names nothing, or a file that is neither txt nor jsonl.
    """
    known = "; text files end in .txt or .jsonl, plain or with .gz or .zst after it"
    found: dict[str, None] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            below = sorted(str(p) for p in Path(path).rglob("*") if p.is_file())
            files = [p for p in below if file_kind(p)]
            if not files:
                raise ValueError(f"no text files in the folder {pattern!r}{known}")
        elif os.path.exists(path):
            files = [path]
        else:
            files = [p for p in sorted(glob.glob(path, recursive=True)) if os.path.isfile(p)]
            if not files:
                raise ValueError(f"no files match {pattern!r}; the current folder is {os.getcwd()}")
        for file in files:
            if file_kind(file) is None:
                raise ValueError(f"unknown file type: {file}{known}")
            found[file] = None
    return tuple(found)


def _object_text(line: bytes, text_key: str, where: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: not valid UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(row).__name__}")
    if text_key not in row:
        keys = ", ".join(sorted(row)) or "none"
        raise ValueError(f"{where}: no key {text_key!r} (keys: {keys}); set data.text_key")
    if not isinstance(row[text_key], str):
        kind = type(row[text_key]).__name__
        raise ValueError(f"{where}: {text_key!r} is not a string but {kind}")
    return row[text_key]


def _scan_jsonl(path: str, name: str, text_key: str) -> Iterator[tuple[int, int]]:
    """Yields offset and length of each line of a jsonl file that holds text."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            start, body = offset, line
            offset += len(line)
            if number == 1 and line.startswith(_BOM):
                start, body = start + len(_BOM), line[len(_BOM) :]
            if body.strip() and _object_text(body, text_key, f"{name}, line {number}").strip():
                yield start, len(body)


def _scan_txt(path: str, name: str, separator: str) -> Iterator[tuple[int, int]]:
    """Yields offset and length of each document of a txt file, without the newlines around it."""
    if os.path.getsize(path) == 0:  # an empty file cannot be mapped
        return
    breaks = re.escape(separator.encode()).replace(b"\\\n", rb"\r?\n")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = len(_BOM) if data[: len(_BOM)] == _BOM else 0
        borders = [m.span() for m in re.finditer(breaks, data)] if separator else []
        for end, following in [*borders, (len(data), len(data))]:
            body = data[start:end]
            try:
                text = body.decode("utf-8")
            except UnicodeDecodeError as error:
                at = start + error.start
                raise ValueError(f"{name}: not valid UTF-8 at byte {at} ({error.reason})") from None
            if text.strip():
                inner = body.strip(b"\r\n")
                yield start + body.index(inner), len(inner)
            start = following


@dataclass(frozen=True)
class _File:
    name: str  # as the user knows it, for messages
    path: str  # what is read: the file itself or its decompressed copy
    kind: str


class TextSource:
    """Documents of local files by index; picklable, and safe to read from several threads.

    Documents that hold white space only are left out. txt: "\\r\\n" reads as "\\n".
    """

    def __init__(
        self, patterns: Sequence[str], *, text_key: str = "text", doc_separator: str = "\n\n\n"
    ):
        """Finds the files and their documents.

        Args:
          patterns: files, folders and globs, as `find_files` takes them.
          text_key: the key of a jsonl object that holds its text.
          doc_separator: what parts the documents of a txt file; "" for one document a file.

        Raises:
          ValueError: no files, no documents, or a file that cannot be read; the message names the
            file, and the line in a jsonl file.
        """
        self._text_key = text_key
        self._files: list[_File] = []
        files, offsets, lengths = array("i"), array("q"), array("q")
        for number, name in enumerate(find_files(patterns)):
            kind = file_kind(name)
            assert kind is not None
            try:
                path = name
                if name.endswith(compressed.SUFFIXES):
                    path = compressed.decompress(name)
                    weakref.finalize(self, os.unlink, path)
                self._files.append(_File(name, path, kind))
                scan = _scan_jsonl if kind == ".jsonl" else _scan_txt
                option = text_key if kind == ".jsonl" else doc_separator
                for offset, length in scan(path, name, option):
                    files.append(number)
                    offsets.append(offset)
                    lengths.append(length)
            except OSError as error:
                raise ValueError(f"cannot read {name}: {error.strerror}") from error
        if not files:
            raise ValueError(f"no documents in {', '.join(patterns)}: the files hold no text")
        self._file = np.asarray(files, np.int32)
        self._offset = np.asarray(offsets, np.int64)
        self._length = np.asarray(lengths, np.int64)

    def __len__(self) -> int:
        return len(self._file)

    @property
    def num_bytes(self) -> int:
        """Bytes of all documents as they lie in their files (jsonl: with the JSON around them)."""
        return int(self._length.sum())

    def __getitem__(self, index: int) -> str:
        """Reads document `index`.

        Raises:
          IndexError: there is no such document.
          ValueError: the file was changed after the source was made.
        """
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        file = self._files[self._file[index]]
        offset, length = int(self._offset[index]), int(self._length[index])
        with open(file.path, "rb") as handle:
            handle.seek(offset)
            data = handle.read(length)
        where = f"{file.name}, byte {offset} (was the file changed?)"
        if len(data) != length:
            raise ValueError(f"{where}: the file is shorter than it was")
        if file.kind == ".jsonl":
            return _object_text(data, self._text_key, where)
        try:
            return data.decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not valid UTF-8") from None

    def __repr__(self) -> str:  # Grain names a dataset by it
        return f"TextSource({len(self)} documents in {len(self._files)} files)"
