"""Writes PyTorch checkpoint files for tests, opcode by opcode, without PyTorch."""

import struct
import zipfile
from pathlib import Path

import numpy as np

_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
}


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _int(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _ints(values) -> bytes:
    return b"(" + b"".join(_int(v) for v in values) + b"t"


def write_torch(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a state_dict in the zip format of `torch.save` (pickle protocol 2)."""
    pickled = b"\x80\x02}("
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for key, (name, array) in enumerate(tensors.items()):
            strides = [s // array.itemsize for s in np.ascontiguousarray(array).strides]
            storage = _text("storage") + f"ctorch\n{_STORAGES[array.dtype.name]}\n".encode()
            storage += _text(str(key)) + _text("cpu") + _int(array.size)
            pickled += _text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
            pickled += b"(" + storage + b"tQ" + _int(0) + _ints(array.shape) + _ints(strides)
            pickled += b"\x89NtR"
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/data.pkl", pickled + b"u.")
