"""Reads PyTorch `.bin`, `.pt` and `.pth` files without PyTorch, and without running their code.

Such a file (PyTorch 1.6 and later) is a zip archive of uncompressed members: `data.pkl`, a pickle
that describes the tensors, and `data/<key>`, the raw bytes of each storage. A pickle can name any
Python function and call it, so the unpickler here knows a short list of names, all of its own
making, and refuses every other one. Storages are mapped into memory, never read as a whole;
tensors may share one, and may be strided views of it.
"""

import io
import math
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jet_jax.safetensors_files import map_file

# Storage classes and dtypes become plain strings: a pickle can set no attribute on a string.
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_TORCH_DTYPES = {name: name for name in _STORAGE_DTYPES.values()}
_WRAPPERS = ("state_dict", "model", "module")  # keys under which training scripts nest the weights


class _Storage(NamedTuple):
    """A flat run of elements: raw bytes and, unless the storage is untyped, a dtype."""

    data: np.ndarray  # uint8
    dtype: str | None


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Opens a PyTorch checkpoint file without reading its data.

    Args:
      path: a file written by `torch.save` whose content is a mapping of names to tensors, or such
        a mapping under `state_dict`, `model` or `module`.

    Returns:
      Read-only arrays by name, each a lazy (perhaps strided) view of the mapped file. bfloat16
      comes as `ml_dtypes.bfloat16`.

    Raises:
      ValueError: the file is no zip archive (older than PyTorch 1.6), is damaged, holds something
        that is not a tensor, or its pickle asks for a name that is not on the list.
    """
    path = Path(path)
    data = map_file(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not a zip archive: it is truncated, or it was written before PyTorch 1.6. "
            "Download it again, or save it anew with a newer PyTorch or as safetensors"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            prefix = _prefix(path, archive)
            _check_byte_order(path, archive, prefix)
            pickled = archive.read(f"{prefix}data.pkl")
            members = {
                info.filename.removeprefix(f"{prefix}data/"): _member(path, data, info)
                for info in archive.infolist()
                if info.filename.startswith(f"{prefix}data/") and not info.is_dir()
            }
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    content = _Unpickler(path, pickled, members).read()
    return _tensors(path, content)


class _Rebuild:
    """Stands for PyTorch's functions that make a tensor from a storage.

    A fresh instance without attributes for each file: nothing that a pickle does to it lasts.
    """

    __slots__ = ("_kind", "_path")

    def __init__(self, path: Path, kind: str):
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_kind", kind)

    def __setattr__(self, name, value):
        raise ValueError(f"{self._path}: the pickle tries to set the attribute {name!r}")

    def __call__(self, *args):
        try:
            if self._kind == "parameter":  # data, requires_grad, hooks
                (array, *_) = args
                if not isinstance(array, np.ndarray):
                    raise TypeError("a parameter without a tensor")
                return array
            storage, offset, size, stride, *rest = args
            dtype = rest[2] if self._kind == "tensor_v3" else storage.dtype
            return _strided(storage, dtype, offset, size, stride)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(f"{self._path}: a malformed tensor ({error})") from error


class _Unpickler(pickle.Unpickler):
    """Unpickles tensors and plain containers, nothing else."""

    def __init__(self, path: Path, pickled: bytes, members: dict[str, np.ndarray]):
        super().__init__(io.BytesIO(pickled))
        self._path = path
        self._members = members
        self._names: dict[tuple[str, str], object] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor"): _Rebuild(path, "tensor"),
            ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(path, "tensor"),
            ("torch._utils", "_rebuild_tensor_v3"): _Rebuild(path, "tensor_v3"),
            ("torch._utils", "_rebuild_parameter"): _Rebuild(path, "parameter"),
            ("torch.storage", "UntypedStorage"): "untyped",
            **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
            **{("torch", name): dtype for name, dtype in _TORCH_DTYPES.items()},
        }

    def read(self) -> object:
        """Returns the unpickled content.

        Raises:
          ValueError: the pickle is damaged or asks for a name that is not on the list.
        """
        try:
            return self.load()
        except ValueError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"{self._path}: its pickle is damaged ({error!r})") from error

    def find_class(self, module_name: str, global_name: str) -> object:
        """Looks a name up in the list; never imports anything."""
        try:
            return self._names[module_name, global_name]
        except KeyError:
            raise ValueError(
                f"{self._path}: its pickle asks for {module_name}.{global_name}, which is neither "
                "a tensor nor a container of tensors; the file was not loaded. Weights alone "
                "(a state_dict) load; do not trust a weight file that wants anything else"
            ) from None

    def persistent_load(self, pid: object) -> _Storage:
        """Returns the storage that a persistent id `('storage', type, key, device, n)` names."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise ValueError(f"{self._path}: unknown persistent id {pid!r} in its pickle")
        _, kind, key, _, count = pid
        if kind not in ("untyped", *_TORCH_DTYPES) or type(count) is not int or count < 0:
            raise ValueError(f"{self._path}: malformed storage {pid!r} in its pickle")
        dtype = None if kind == "untyped" else kind
        nbytes = count * (_dtype(dtype).itemsize if dtype else 1)
        if key not in self._members:
            raise ValueError(f"{self._path}: storage {key!r} is missing from the archive")
        data = self._members[key]
        if len(data) < nbytes:
            raise ValueError(
                f"{self._path} is truncated: storage {key!r} needs {nbytes} bytes, has {len(data)}"
            )
        return _Storage(data[:nbytes], dtype)


def _dtype(name: str) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _strided(storage: _Storage, dtype_name, offset, size, stride) -> np.ndarray:
    """Returns the view `storage[offset + Σ index·stride]`, checked to lie inside the storage."""
    if not isinstance(storage, _Storage) or dtype_name not in _TORCH_DTYPES:
        raise TypeError(f"storage of dtype {dtype_name!r}")
    dtype = _dtype(dtype_name)
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"offset {offset}, size {size}, stride {stride}")
    if math.prod(size) == 0:
        return np.empty(size, dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    usable = len(storage.data) // dtype.itemsize
    if last >= usable:
        raise ValueError(f"element {last} of a storage of {usable}")
    flat = storage.data[: usable * dtype.itemsize].view(dtype)[offset:]
    strides = tuple(step * dtype.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(flat, size, strides, writeable=False)


def _prefix(path: Path, archive: zipfile.ZipFile) -> str:
    """Returns the archive's top folder, with its slash, or ''."""
    found = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
    if len(found) != 1:
        raise ValueError(
            f"{path} is a zip archive, but not one of torch.save: it has {len(found)} data.pkl"
        )
    return found[0].removesuffix("data.pkl")


def _check_byte_order(path: Path, archive: zipfile.ZipFile, prefix: str) -> None:
    name = f"{prefix}byteorder"
    if name in archive.namelist() and archive.read(name) != b"little":
        raise ValueError(f"{path} was written on a big-endian machine; save it on a little-endian")


def _member(path: Path, data: mmap.mmap, info: zipfile.ZipInfo) -> np.ndarray:
    """Returns a member's bytes as a view of the mapped file.

    The central directory does not say where a member's data starts: its local header has a name
    and an extra field (PyTorch pads with it) of its own.
    """
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{path}: {info.filename} is compressed; torch.save never does that")
    header = data[info.header_offset : info.header_offset + 30]
    if len(header) != 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{path} is damaged: no local header for {info.filename}")
    name_bytes = int.from_bytes(header[26:28], "little")
    extra_bytes = int.from_bytes(header[28:30], "little")
    start = info.header_offset + 30 + name_bytes + extra_bytes
    if start + info.file_size > len(data):
        raise ValueError(f"{path} is truncated: {info.filename} reaches beyond its end")
    if info.file_size == 0:
        return np.empty(0, np.uint8)
    return np.frombuffer(data, np.uint8, info.file_size, start)


def _tensors(path: Path, content: object) -> dict[str, np.ndarray]:
    """Returns the mapping of names to tensors in what a checkpoint holds."""
    if isinstance(content, dict):
        for key in _WRAPPERS:
            if isinstance(content.get(key), dict):
                content = content[key]
                break
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}; expected a state_dict, a mapping of names "
            "to tensors"
        )
    wrong = [
        repr(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, np.ndarray))
    ]
    if wrong:
        raise ValueError(
            f"{path}: expected a mapping of names to tensors; these entries are something else: "
            f"{', '.join(wrong[:10])}"
        )
    return dict(content)
