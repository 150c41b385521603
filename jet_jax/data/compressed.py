"""Whole-file decompression of gzip and Zstandard files, which refuses truncated ones."""

import gzip
import os
import shutil
import tempfile
import zlib
from typing import BinaryIO

import zstandard

SUFFIXES = (".gz", ".zst")
_CHUNK = 1 << 20


def _unzstd(source: BinaryIO, target: BinaryIO, name: str) -> None:
    # zstandard's stream reader takes a truncated file for a finished one, so frames are walked
    # here and the last one must have ended.
    codec, data = None, source.read(_CHUNK)
    while data or codec is not None:
        if codec is None:
            codec = zstandard.ZstdDecompressor().decompressobj()
        if not data:
            raise ValueError(f"{name}: the Zstandard data ends too early; the file is truncated")
        target.write(codec.decompress(data))
        if codec.eof:
            data, codec = codec.unused_data, None
        else:
            data = b""
        data = data or source.read(_CHUNK)


def decompress(path: str) -> str:
    """Decompresses a .gz or .zst file into a temporary file and returns that file's path.

    The temporary file lies in the folder of temporary files (TMPDIR), so what the text needs is
    disk there, not memory. The caller deletes it.

    Raises:
      ValueError: the file is damaged or truncated.
    """
    handle, temporary = tempfile.mkstemp(prefix="jet-jax-", suffix=".text")
    try:
        with os.fdopen(handle, "wb") as target, open(path, "rb") as source:
            if path.endswith(".gz"):
                with gzip.open(source, "rb") as plain:
                    shutil.copyfileobj(plain, target, _CHUNK)
            else:
                _unzstd(source, target, path)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        os.unlink(temporary)
        raise ValueError(f"{path}: cannot be decompressed ({error}); make the file again") from None
    except BaseException:
        os.unlink(temporary)
        raise
    return temporary
