"""Tensor files: safetensors both ways, PyTorch files without torch, shards, damaged files."""

import json
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jet_jax.copying import contiguous_copy
from jet_jax.safetensors_files import TensorSpec, read_safetensors, write_safetensors
from jet_jax.tensor_files import open_tensor_files, plan_shards, write_tensor_files
from jet_jax.torch_pickle import read_torch

TORCH_FILES = Path(__file__).parent / "golden" / "torch_files"
BF16 = np.dtype(ml_dtypes.bfloat16)


def some_tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(7, 5)).astype(np.float32),
        "half": rng.normal(size=(3, 4)).astype(np.float16),
        "brain": rng.normal(size=(9,)).astype(BF16),
        "double": rng.normal(size=(2, 2)),
        "counts": np.arange(3, dtype=np.int32),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
    }


def specs_of(tensors):
    return {name: TensorSpec(x.shape, x.dtype) for name, x in tensors.items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert left[name].tobytes() == right[name].tobytes(), name


def test_safetensors_agree_with_the_formats_own_library(tmp_path):
    tensors = some_tensors()
    write_safetensors(tmp_path / "ours.safetensors", specs_of(tensors), tensors.__getitem__)
    assert_same(safetensors.numpy.load_file(tmp_path / "ours.safetensors"), tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors")
    assert_same(read_safetensors(tmp_path / "theirs.safetensors"), tensors)


def test_writing_a_strided_tensor_stores_it_in_order(tmp_path):
    tensors = {"t": np.arange(12, dtype=np.float32).reshape(3, 4).T}
    write_safetensors(tmp_path / "t.safetensors", specs_of(tensors), tensors.__getitem__)
    np.testing.assert_array_equal(read_safetensors(tmp_path / "t.safetensors")["t"], tensors["t"])


@pytest.mark.parametrize("shape", [(70, 33), (5, 4, 97), (3,), ()])
def test_contiguous_copies_are_row_major_copies(shape):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for view in (array, array.T, array[::-1] if shape else array):
        copy = contiguous_copy(view, BF16)
        assert copy.flags.c_contiguous and copy.dtype == BF16
        np.testing.assert_array_equal(copy, view.astype(BF16))
        assert not np.shares_memory(contiguous_copy(view), array)


@pytest.mark.parametrize("keep", ["all but 10 bytes", "half the header", "4 bytes", "nothing"])
def test_truncated_safetensors_are_refused(tmp_path, keep):
    tensors = some_tensors()
    path = tmp_path / "model.safetensors"
    write_safetensors(path, specs_of(tensors), tensors.__getitem__)
    size = path.stat().st_size
    os.truncate(path, {"a": size - 10, "h": 200, "4": 4, "n": 0}[keep[0]])
    with pytest.raises(ValueError, match="model.safetensors is (truncated|empty)") as error:
        read_safetensors(path)
    if keep[0] == "a":
        assert f"need {size} bytes, the file has {size - 10} (10 missing)" in str(error.value)


def test_malformed_safetensors_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"

    def write(header, data=b""):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)

    write(b"{not json")
    with pytest.raises(ValueError, match="x.safetensors is not a safetensors file: bad header"):
        read_safetensors(path)
    write({"w": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"1")
    with pytest.raises(ValueError, match="tensor 'w' has dtype F8_E4M3; supported are F64, F32"):
        read_safetensors(path)
    write({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678")
    with pytest.raises(ValueError, match="needs 12 bytes, its header entry gives 8"):
        read_safetensors(path)
    write({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678")
    with pytest.raises(ValueError, match="4 bytes after its last tensor"):
        read_safetensors(path)
    write({"w": {"dtype": "F32", "shape": "no"}})
    with pytest.raises(ValueError, match="entry of tensor 'w' is malformed"):
        read_safetensors(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        read_safetensors(path)


def ramp(*shape, dtype=np.float32):
    return (np.arange(np.prod(shape), dtype=np.float64) / 4).reshape(shape).astype(dtype)


def test_torch_file_without_torch():
    base = ramp(6, 8)
    expected = {
        "bf16": ramp(5, 3, dtype=BF16),
        "fp16": ramp(5, 3, dtype=np.float16),
        "fp32": base,
        "fp64": ramp(2, 2, dtype=np.float64),
        "int64": np.arange(4),
        "bool": np.array([True, False]),
        "shared": base,
        "rows": base[2:4],
        "transposed": base.T,
        "stepped": base[::2, 1::3],
        "expanded": np.broadcast_to(ramp(3), (4, 3)),
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": ramp(3, dtype=BF16),
    }
    tensors = read_torch(TORCH_FILES / "tensors.bin")
    assert_same(tensors, expected)
    assert np.shares_memory(tensors["fp32"], tensors["shared"])  # one storage, read once


@pytest.mark.parametrize("file", ["state_dict.bin", "nested.pt"])
def test_torch_state_dict_plain_and_nested(file):
    assert_same(
        read_torch(TORCH_FILES / file),
        {"weight": ramp(3, 4), "bias": np.zeros(3, np.float32)},
    )


def test_torch_module_is_refused_by_name():
    with pytest.raises(ValueError, match=r"module.pt.*torch\.nn\.modules\.linear\.Linear"):
        read_torch(TORCH_FILES / "module.pt")


def test_torch_files_older_than_zip_are_refused():
    with pytest.raises(ValueError, match="legacy.bin is not a zip archive.*before PyTorch 1.6"):
        read_torch(TORCH_FILES / "legacy.bin")


def with_pickle(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """Writes an archive in PyTorch's layout around any pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return path


class _Attack:
    """Unpickling it with Python's own unpickler runs a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_malicious_pickle_runs_nothing_and_is_named(tmp_path):
    witness = tmp_path / "witness"
    pickled = pickle.dumps({"weight": _Attack(f"touch {witness}")}, protocol=2)
    path = with_pickle(tmp_path / "pytorch_model.bin", pickled)
    with pytest.raises(ValueError, match=r"pytorch_model.bin.*asks for (posix|nt)\.system"):
        read_torch(path)
    assert not witness.exists()
    pickle.loads(pickled)  # the attack is real: the ordinary unpickler falls for it
    assert witness.exists()


# Hand-made pickles (protocol 2): push a global, call it, set state on what comes back.
_REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
_STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"
)


def tensor_pickle(count: int, offset: int, size: bytes, stride: bytes) -> bytes:
    storage = _STORAGE.replace(b"%c", bytes([count]))
    args = b"(" + storage + b"K" + bytes([offset]) + b"K" + size + b"\x85K" + stride + b"\x85"
    return b"\x80\x02}X\x01\x00\x00\x00w" + _REBUILD + args + b"\x89NtRs."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (tensor_pickle(4, 1, b"\x04", b"\x01"), "element 4 of a storage of 4"),
        (tensor_pickle(4, 0, b"\x03", b"\x02"), "element 4 of a storage of 4"),
        (tensor_pickle(5, 0, b"\x04", b"\x01"), "storage '0' needs 20 bytes, has 16"),
        (b"\x80\x02cbuiltins\neval\n.", r"asks for builtins\.eval"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", r"torch\.storage\._load_from_bytes"),
        (b"\x80\x02" + _REBUILD + b"}X\x01\x00\x00\x00aK\x01sb.", "damaged"),
        (b"\x80\x02" + _REBUILD + b"N}X\x01\x00\x00\x00aK\x01s\x86b.", "tries to set .* 'a'"),
        (b"\x80\x02" + _REBUILD + b"(K\x01K\x02tR.", "malformed tensor"),
        (b"\x80\x02(K\x01tQ.", "unknown persistent id"),
        (b"\x80\x02}X\x01\x00\x00\x00wK\x01s.", "these entries are something else: 'w'"),
        (b"\x80\x02K\x01.", "holds a int; expected a state_dict"),
        (b"\x80\x02}X\x01", "pickle is damaged"),
    ],
)
def test_hostile_and_damaged_pickles_are_refused(tmp_path, pickled, message):
    path = with_pickle(tmp_path / "w.bin", pickled, {"0": bytes(16)})
    with pytest.raises(ValueError, match=message):
        read_torch(path)


def test_the_hand_made_tensor_pickle_is_otherwise_valid(tmp_path):
    data = np.arange(4, dtype=np.float32)
    path = with_pickle(
        tmp_path / "w.bin", tensor_pickle(4, 1, b"\x03", b"\x01"), {"0": data.tobytes()}
    )
    np.testing.assert_array_equal(read_torch(path)["w"], data[1:])


def test_damaged_torch_archives_are_refused(tmp_path):
    whole = (TORCH_FILES / "tensors.bin").read_bytes()
    path = tmp_path / "cut.bin"
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="cut.bin is not a zip archive: it is truncated"):
        read_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(100))
    with pytest.raises(ValueError, match="is compressed"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", b"x")
    with pytest.raises(ValueError, match="not one of torch.save"):
        read_torch(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/byteorder", b"big")
    with pytest.raises(ValueError, match="big-endian"):
        read_torch(path)


def test_shards_and_index_read_back(tmp_path):
    tensors = some_tensors()
    specs = specs_of(tensors)
    files = write_tensor_files(tmp_path, specs, tensors.__getitem__, max_shard_bytes=60)
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for name, file in index["weight_map"].items():
        assert name in safetensors.numpy.load_file(tmp_path / file)
    opened = open_tensor_files(tmp_path)
    assert opened.specs == specs
    read = opened.reader()
    assert_same({name: read(name) for name in tensors}, tensors)


def test_one_file_needs_no_index(tmp_path):
    tensors = some_tensors()
    written = write_tensor_files(tmp_path, specs_of(tensors), tensors.__getitem__)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"] == [written[0].name]


def test_shards_hold_whole_tensors_in_order():
    f32 = np.dtype("float32")
    specs = {n: TensorSpec((size,), f32) for n, size in (("a", 3), ("b", 2), ("c", 9), ("d", 1))}
    assert plan_shards(specs, 20) == [["a", "b"], ["c"], ["d"]]
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        plan_shards(specs, 0)


def test_directories_that_do_not_add_up(tmp_path):
    with pytest.raises(ValueError, match="has no weights; expected model.safetensors"):
        open_tensor_files(tmp_path)
    tensors = some_tensors()
    files = write_tensor_files(tmp_path, specs_of(tensors), tensors.__getitem__, max_shard_bytes=60)
    index_path = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    stray = files[0].read_bytes()
    files[0].unlink()
    with pytest.raises(ValueError, match=f"lacks 1 of the {len(files)} weight.*{files[0].name}"):
        open_tensor_files(tmp_path)
    files[0].write_bytes(stray)

    moved = index | {"weight_map": index["weight_map"] | {"matrix": files[-1].name}}
    index_path.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match="disagree about 1 tensors, such as matrix"):
        open_tensor_files(tmp_path)
    index_path.write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside its own directory"):
        open_tensor_files(tmp_path)
    index_path.write_text("{}")
    with pytest.raises(ValueError, match="is not a weight index"):
        open_tensor_files(tmp_path)
    index_path.unlink()
    with pytest.raises(ValueError, match=f"has {len(files)} weight files .* and no index"):
        open_tensor_files(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for name in ("a", "b"):
        safetensors.numpy.save_file({"w": np.zeros(2)}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="tensor 'w' is in both a.safetensors and b.safetensors"):
        open_tensor_files(tmp_path)


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    megabyte = 2**20
    specs = {f"w{i}": TensorSpec((4 * megabyte,), np.dtype("float32")) for i in range(4)}
    tracemalloc.start()
    write_tensor_files(tmp_path, specs, lambda name: np.zeros(*specs[name]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    read = open_tensor_files(tmp_path).reader()
    with_data = sum(float(read(name)[-1]) for name in specs)
    read_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert with_data == 0.0
    assert 16 * megabyte <= peak < 36 * megabyte  # the file has 64 MiB; at most two tensors live
    assert read_peak < megabyte  # a mapped file is not copied
