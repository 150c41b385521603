"""Whole models on disk: every format and back, interrupted writes, unsuitable directories."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import numpy as jnp
from safetensors.numpy import load_file, save_file

import jet_jax
from jet_jax import checkpoint, directories, hf, io
from jet_jax.config import ModelConfig
from jet_jax.convert import convert
from jet_jax.models.lm import HybridLM
from jet_jax.params import flatten, split
from jet_jax.placing import build, weight_specs
from jet_jax.sharding import make_mesh, shardings

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(p.parent.name for p in GOLDEN.glob("*_small/config.json"))
FLA = ["fla/delta_net", "fla/kda"]  # tied and untied; short convolutions and low-rank pairs
JET = GOLDEN / "jet_nemotron_small"


def weights_of(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(split(model)[1]).items()}


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert left[name].shape == right[name].shape, name
        assert left[name].tobytes() == right[name].tobytes(), name


def stored_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.fixture(scope="module")
def twelve() -> HybridLM:
    """Twelve layers of three kinds; each knows its number by its norm's scale.

    With q/k norms and a jet layer no published architecture holds it.
    """
    attention = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "qk_norm": True}
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=6,
        layer_types=("jet", "swa", "attn") * 4,
        mixers={
            "attn": attention,
            "swa": attention | {"window_size": 3},
            "jet": {"num_heads": 1, "head_dim": 4, "generator_reduction": 2},
        },
        tie_word_embeddings=False,
        dtype="float32",
    )
    rng = np.random.default_rng(0)
    params = {
        path: jnp.asarray(rng.normal(size=spec.shape), jnp.float32)
        for path, spec in weight_specs(config).items()
    }
    for i in range(12):
        params[f"layers.{i}.input_layernorm.scale"] = jnp.full(8, i, jnp.float32)
    return build(config, params)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """A converted model that tests may copy but not change."""
    path = tmp_path_factory.mktemp("converted") / "qwen"
    convert(GOLDEN / "qwen2_small", path)
    return path


@pytest.mark.parametrize("name", MODELS + FLA)
def test_hf_to_orbax_to_hf_is_exact(tmp_path, name):
    source = Path(shutil.copytree(GOLDEN / name, tmp_path / "source"))
    for file in ("tokenizer.json", "merges.txt", "tokenizer.model", "LICENSE", "chat.jinja"):
        (source / file).write_text(f"{name} {file}")
    (source / "optimizer.pt").write_text("not part of the model")
    config_text = (source / "config.json").read_text()
    # Odd spacing and key order have to survive too.
    (source / "config.json").write_text(config_text.replace(",\n", " ,\n\n", 1))
    tensors = load_file(source / "model.safetensors")
    half = {k: x.astype(np.float16 if "norm" in k else x.dtype) for k, x in tensors.items()}
    half = {k: x.astype(ml_dtypes.bfloat16) if "mlp" in k else x for k, x in half.items()}
    if "lm_head.weight" not in half:
        embedding = next(k for k in half if "embed" in k)
        half["lm_head.weight"] = half[embedding].copy()
    save_file(half, source / "model.safetensors", {"format": "pt"})

    convert(source, tmp_path / "orbax")
    shutil.move(source, tmp_path / "away")  # a checkpoint alone is enough to export
    convert(tmp_path / "orbax", tmp_path / "back", max_shard_bytes=60_000)
    source, back = tmp_path / "away", tmp_path / "back"

    assert_same(stored_tensors(back), half)
    assert (back / "config.json").read_text() == (source / "config.json").read_text()
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == half.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in half.values())
    copied = {p.name for p in source.iterdir()} - {"expected.npz", "optimizer.pt"}
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert {p.name for p in back.iterdir()} == (
        (copied - {"model.safetensors"}) | shards | {"model.safetensors.index.json"}
    )
    assert (back / "tokenizer.json").read_text() == f"{name} tokenizer.json"
    assert io.tokenizer_dir(tmp_path / "orbax") == tmp_path / "orbax" / "tokenizer"


def test_twelve_layers_stay_in_order_on_every_path(tmp_path, twelve):
    want = weights_of(twelve)
    jet_jax.save(twelve, tmp_path / "hf", format="hf")
    jet_jax.save(twelve, tmp_path / "orbax", format="orbax")
    convert(tmp_path / "hf", tmp_path / "hf_orbax")
    convert(tmp_path / "orbax", tmp_path / "orbax_hf")
    convert(tmp_path / "hf", tmp_path / "sharded", to="hf", max_shard_bytes=1000)
    convert(tmp_path / "orbax", tmp_path / "again", to="orbax")
    for path in sorted(tmp_path.iterdir()):
        model = jet_jax.load(path, dtype=None)
        assert model.config == twelve.config
        assert [float(x.input_layernorm.scale[0]) for x in model.layers] == list(range(12))
        assert_same(weights_of(model), want)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == (
        "jet_jax_hybrid"
    )


def test_restore_casts_and_spreads_over_another_mesh(tmp_path, twelve):
    checkpoint.save_model(tmp_path / "m", twelve.config, split(twelve)[1])
    mesh = make_mesh(1, 4, 2)
    config, params = checkpoint.restore_params(tmp_path / "m", 0, "bfloat16", mesh)
    assert config.dtype == "bfloat16"
    assert list(params["layers"]) == list(range(12))
    flat = flatten(params)
    wanted = shardings(flat, mesh)
    for path, x in weights_of(twelve).items():
        keeps = path.endswith(("A_log", "dt_bias"))
        assert flat[path].sharding == wanted[path]
        expected = x if keeps else x.astype(ml_dtypes.bfloat16)
        assert np.asarray(flat[path]).tobytes() == expected.tobytes(), path


def test_a_saved_model_does_not_tell_where_it_was_written(tmp_path, twelve):
    checkpoint.save_model(tmp_path / "secret" / "model", twelve.config, split(twelve)[1])
    files = [path for path in (tmp_path / "secret").rglob("*") if path.is_file()]
    assert any(path.name == "commit_success.txt" for path in files)
    assert not [path for path in files if b"secret" in path.read_bytes()]


def test_saving_in_bfloat16_says_so_in_the_config(tmp_path):
    jet_jax.save(jet_jax.load(JET), tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == json.loads((JET / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    tensors = stored_tensors(tmp_path / "m")
    assert tensors["model.layers.0.self_attn.A_log"].dtype == np.float32
    assert tensors["model.norm.weight"].dtype == ml_dtypes.bfloat16
    assert jet_jax.load(tmp_path / "m", dtype=None).config.dtype == "bfloat16"


def test_a_training_run_loads_by_directory_and_by_step(tmp_path, twelve):
    run = tmp_path / "run"
    flat = weights_of(twelve)
    with ocp.CheckpointManager(run) as manager:
        for step in (3, 20):
            params = flat | {"norm.scale": np.full(8, step, np.float32)}
            items = {
                "params": ocp.args.StandardSave(params),
                "opt_state": ocp.args.StandardSave({"mu": params}),
                "config": ocp.args.JsonSave({"model": twelve.config.to_dict(), "train": {}}),
            }
            manager.save(step, args=ocp.args.Composite(**items))
    (run / "tokenizer").mkdir()
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    shutil.copytree(run / "20", run / "30.orbax-checkpoint-tmp-1")  # cut short while saving

    assert float(jet_jax.load(run).norm.scale[0]) == 20
    assert float(jet_jax.load(run / "3").norm.scale[0]) == 3
    assert io.load_config(run) == twelve.config
    assert io.tokenizer_dir(run / "3") == io.tokenizer_dir(run) == run / "tokenizer"
    with pytest.raises(ValueError, match="has no step 4; it has 3, 20"):
        checkpoint.restore_params(run, 4)
    convert(run / "3", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert_same(
        weights_of(jet_jax.load(tmp_path / "out", dtype=None)),
        flat | {"norm.scale": np.full(8, 3, np.float32)},
    )
    with pytest.raises(ValueError, match="holds a training run; overwrite replaces model"):
        convert(JET, run, overwrite=True)


def test_unsuitable_directories_are_refused_with_the_reason(tmp_path, qwen, twelve):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        jet_jax.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model.safetensors is a file; expected a model directory"):
        jet_jax.load(JET / "model.safetensors")
    with pytest.raises(ValueError, match="neither a config.json .* nor a finished checkpoint"):
        jet_jax.load(tmp_path)
    cut = Path(shutil.copytree(qwen, tmp_path / "cut"))
    (cut / "0").rename(cut / "0.orbax-checkpoint-tmp-7")
    with pytest.raises(ValueError, match="nor a finished checkpoint"):
        jet_jax.load(cut)
    with pytest.raises(ValueError, match="format='torch'; expected 'hf' or 'orbax'"):
        jet_jax.save(twelve, tmp_path / "x", format="torch")
    with pytest.raises(ValueError, match="to='gguf'"):
        convert(JET, tmp_path / "x", to="gguf")


def test_a_checkpoint_whose_config_is_another_models_is_refused(tmp_path, qwen):
    path = Path(shutil.copytree(qwen, tmp_path / "mixed"))
    record_path = path / "0" / "config" / "metadata"
    record = json.loads(record_path.read_text())
    record["model"]["layer_types"].append("attn")
    record["model"]["vocab_size"] += 1
    record_path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="12 missing, 0 surplus, 1 misshapen") as error:
        jet_jax.load(path)
    assert "embed_tokens.embedding [259, 96], expected [260, 96]" in str(error.value)
    del record["model"]["vocab_size"]
    record_path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="(?s)config item describes no model.*vocab_size"):
        jet_jax.load(path)


def test_saving_another_model_than_the_config_is_refused(tmp_path):
    changed = jet_jax.load(JET)
    changed.config = changed.config.replace(layer_types=("jet", "attn") * 3, vocab_size=12)
    for format in ("hf", "orbax"):
        with pytest.raises(ValueError, match="0 missing, 0 surplus, 1 misshapen"):
            jet_jax.save(changed, tmp_path / "m", format=format)
    assert not list(tmp_path.iterdir())


def test_existing_destinations(tmp_path, qwen):
    target = tmp_path / "model"
    target.mkdir()
    (target / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="model already exists; .* or pass --overwrite"):
        convert(qwen, target)
    with pytest.raises(ValueError, match="holds something else than a model"):
        convert(qwen, target, overwrite=True)
    assert (target / "precious.txt").read_text() == "x"
    (target / "precious.txt").unlink()
    convert(qwen, target, overwrite=True)  # an empty directory
    (target / "old.txt").write_text("x")
    convert(GOLDEN / "qwen3_small", target, to="hf", overwrite=True)
    assert not (target / "old.txt").exists()
    assert hf.read_config(target) == hf.read_config(GOLDEN / "qwen3_small")
    assert list(tmp_path.iterdir()) == [target]
    for inside in (qwen, qwen / "0" / "out", qwen.parent):
        with pytest.raises(ValueError, match="overlap"):
            convert(qwen, inside, overwrite=True)


def test_bad_weights_are_reported_before_anything_is_written(tmp_path):
    source = Path(shutil.copytree(JET, tmp_path / "source"))
    os.truncate(source / "model.safetensors", 10**5)
    with pytest.raises(ValueError, match="model.safetensors is truncated"):
        convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("exists", [False, True])
def test_a_failed_write_leaves_nothing_and_harms_nothing(tmp_path, qwen, monkeypatch, exists):
    target = tmp_path / "model"
    if exists:
        convert(GOLDEN / "qwen3_small", target, to="hf")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(hf, "write_text", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(qwen, target, overwrite=exists)
    assert list(tmp_path.iterdir()) == ([target] if exists else [])
    if exists:
        assert hf.read_config(target) == hf.read_config(GOLDEN / "qwen3_small")


def test_a_killed_write_leaves_only_what_is_known_as_unfinished(tmp_path, monkeypatch, qwen):
    target = tmp_path / "model"
    program = f"""
import os, signal
from jet_jax.directories import new_directory
with new_directory({str(target)!r}) as work:
    (work / "config.json").write_text("{{}}")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert not target.exists() and directories.leftovers(target) == [left]
    with pytest.raises(ValueError, match="unfinished part of a write that was cut short"):
        jet_jax.load(left)
    warnings = []
    monkeypatch.setattr(directories.logging, "warning", lambda *args: warnings.append(args[1:]))
    convert(qwen, target)
    assert warnings == [(left,)] and left.exists()
    assert not directories.leftovers(tmp_path / "mod")
