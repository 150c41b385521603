"""Reads and writes single `.safetensors` files, one tensor at a time.

The format (https://github.com/huggingface/safetensors): eight bytes with the little-endian length
of a JSON header, the header (`name -> {dtype, shape, data_offsets}`), then the tensors' bytes.
Reading maps the file into memory: an array costs nothing until it is used, and a slice of it reads
only its own pages. Writing streams, so that no second copy of a shard is ever held.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jet_jax.copying import contiguous_copy

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("int64"),
    "I32": np.dtype("int32"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library


class TensorSpec(NamedTuple):
    """Shape and dtype of a tensor that is not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def map_file(path: Path) -> mmap.mmap:
    """Maps a file read-only.

    Args:
      path: the file.

    Returns:
      The mapping; arrays made from it keep it alive.

    Raises:
      ValueError: the file is empty or is a Git LFS pointer in place of the data.
    """
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path} is empty; download it again")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Opens a safetensors file without reading its data.

    Args:
      path: the file.

    Returns:
      Read-only arrays by name, in the header's order, each a lazy view of the mapped file.
      bfloat16 comes as `ml_dtypes.bfloat16`.

    Raises:
      ValueError: the file is truncated, malformed, or holds a dtype that is not supported; the
        message names the file and the tensor.
    """
    path = Path(path)
    data = map_file(path)
    header, start = _read_header(path, data)
    entries = {
        name: _parse_entry(path, name, entry)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    needed = start + max((end for _, _, end in entries.values()), default=0)
    if needed > len(data):
        cut = next(name for name, (_, _, end) in entries.items() if start + end > len(data))
        raise ValueError(
            f"{path} is truncated: its tensors (such as {cut!r}) need {needed} bytes, the file has "
            f"{len(data)} ({needed - len(data)} missing); download it again"
        )
    if needed < len(data):
        raise ValueError(
            f"{path} holds {len(data) - needed} bytes after its last tensor, which no safetensors "
            "file should; download it again"
        )
    return {name: _view(data, spec, start + begin) for name, (spec, begin, _) in entries.items()}


def write_safetensors(
    path: str | os.PathLike,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes a safetensors file, holding one tensor in memory at a time.

    Args:
      path: the file to create or replace.
      specs: shape and dtype by name, in the order in which the tensors are to lie in the file.
      read: gives the tensor of a name, of exactly the shape and dtype of its spec.

    Raises:
      ValueError: a dtype that the format does not have.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        if spec.dtype not in _CODES:
            raise ValueError(
                f"tensor {name!r} has dtype {spec.dtype}, which safetensors files written here "
                f"cannot hold; supported are {', '.join(str(d) for d in _CODES)}"
            )
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on an eight-byte boundary
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name, spec in specs.items():
            array = read(name)
            assert TensorSpec(array.shape, array.dtype) == spec, (name, array.shape, array.dtype)
            if not array.flags.c_contiguous:
                array = contiguous_copy(array)
            # bfloat16 has no buffer protocol, hence the bytes.
            file.write(array.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict, int]:
    """Returns the parsed header and the offset of the first tensor byte."""
    if len(data) < 8:
        raise ValueError(f"{path} is truncated: {len(data)} bytes, fewer than the 8 of its length")
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{path} is not a safetensors file: its header would have {length} bytes")
    if 8 + length > len(data):
        raise ValueError(
            f"{path} is truncated: its header needs {8 + length} bytes, the file has {len(data)}; "
            "download it again"
        )
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:  # also undecodable bytes
        raise ValueError(f"{path} is not a safetensors file: bad header ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is not a JSON object")
    return header, 8 + length


def _parse_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, int, int]:
    """Returns spec, first byte and end of a tensor; both count from the end of the header."""
    try:
        code = entry["dtype"]  # type: ignore[index]
        shape = tuple(int(n) for n in entry["shape"])  # type: ignore[index]
        begin, end = (int(n) for n in entry["data_offsets"])  # type: ignore[index]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: the header entry of tensor {name!r} is malformed") from error
    if code not in DTYPES:
        raise ValueError(
            f"{path}: tensor {name!r} has dtype {code}; supported are {', '.join(DTYPES)}. "
            "A quantised checkpoint has to be converted to bfloat16 first"
        )
    spec = TensorSpec(shape, DTYPES[code])
    if begin < 0 or min(shape, default=0) < 0 or end - begin != spec.nbytes:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {list(shape)} and dtype {code} needs "
            f"{spec.nbytes} bytes, its header entry gives {end - begin}"
        )
    return spec, begin, end


def _view(data: mmap.mmap, spec: TensorSpec, offset: int) -> np.ndarray:
    """Returns a lazy read-only array over the mapping."""
    if spec.nbytes == 0:
        return np.empty(spec.shape, spec.dtype)
    flat = np.frombuffer(data, np.uint8, spec.nbytes, offset)
    return flat.view(spec.dtype).reshape(spec.shape)
