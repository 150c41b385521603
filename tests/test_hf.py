"""Hugging Face directories: names and layouts, checks before reading, dtypes, shardings."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_writer import write_torch

from jet_jax import hf
from jet_jax.config import ModelConfig
from jet_jax.hf_names import expected, hf_name
from jet_jax.params import flatten, split
from jet_jax.placing import place
from jet_jax.sharding import make_mesh, shardings
from jet_jax.weight_checks import fold_layers

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = [*GOLDEN.glob("*_small/config.json"), *GOLDEN.glob("fla/*/config.json")]
MODELS = sorted(str(p.parent.relative_to(GOLDEN)) for p in FOLDERS)
JET = GOLDEN / "jet_nemotron_small"


def weights_of(model) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(split(model)[1]).items()}


@pytest.fixture
def directory(tmp_path):
    """A copy of the small Qwen 2 (tied) whose files a test may change."""
    return Path(shutil.copytree(GOLDEN / "qwen2_small", tmp_path / "model"))


def change_weights(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_the_table_names_exactly_the_stored_tensors(name):
    stored = load_file(GOLDEN / name / "model.safetensors")
    names = expected(hf.read_config(GOLDEN / name))
    assert names.keys() == stored.keys()
    for hf_key, (_, layout, shape) in names.items():
        assert layout.hf_shape(shape) == stored[hf_key].shape
        ours = layout.to_ours(stored[hf_key], shape)
        assert ours.shape == shape
        np.testing.assert_array_equal(layout.to_hf(ours), stored[hf_key])


def test_names_and_layouts_of_a_jet_layer():
    stored = load_file(JET / "model.safetensors")
    ours = weights_of(hf.load(JET, "float32"))
    prefix = "model.layers.2.self_attn."
    np.testing.assert_array_equal(
        ours["layers.2.mixer.q_proj.kernel"], stored[prefix + "q_proj.weight"].T
    )
    np.testing.assert_array_equal(ours["layers.2.mixer.A_log"], stored[prefix + "A_log"])
    np.testing.assert_array_equal(
        ours["layers.2.post_attention_layernorm.scale"],
        stored["model.layers.2.post_attention_layernorm.weight"],
    )
    generator = prefix + "dynamic_conv1d.kernel_generator."
    w2, bias = stored[generator + "w2.weight"], stored[generator + "w2.bias"]
    taps = ours["layers.2.mixer.generator.w2"]  # [R, W, VD]; the stored row is c·W + j
    rank, width, channels = taps.shape
    for r, j, c in [(0, 0, 0), (3, 2, 5), (rank - 1, width - 1, channels - 1)]:
        assert taps[r, j, c] == w2[c * width + j, r]
        assert ours["layers.2.mixer.generator.b2"][j, c] == bias[c * width + j]


def test_a_path_without_a_name_is_refused():
    with pytest.raises(ValueError, match="'encoder.kernel' has no Hugging Face name"):
        hf_name("encoder.kernel")


def test_everything_that_is_wrong_is_reported_together_before_reading(directory, monkeypatch):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.extra.weight"] = np.zeros(3, np.float32)
        tensors["model.norm.weight"] = np.zeros(7, np.float32)
        tensors["model.layers.2.input_layernorm.weight"] = np.zeros(96, np.int32)

    change_weights(directory, change)
    monkeypatch.setattr(hf, "place", None)  # reading would fail otherwise
    with pytest.raises(ValueError) as error:
        hf.load(directory)
    message = str(error.value)
    assert f"{directory}" in message and "1 missing, 1 surplus, 1 misshapen" in message
    for line in (
        "missing    model.layers.1.mlp.up_proj.weight [168, 96]",
        "surplus    model.layers.0.self_attn.extra.weight [3]",
        "misshapen  model.norm.weight [7], expected [96]",
        "not float  model.layers.2.input_layernorm.weight int32",
    ):
        assert line in message


def test_weights_of_another_model_are_refused_in_few_lines(directory):
    shutil.copy(GOLDEN / "gemma3_small" / "model.safetensors", directory)
    with pytest.raises(ValueError, match=r"surplus +model\.layers\.\[3-5\]") as error:
        hf.load(directory)
    assert "are not those of its config (qwen2, 3 layers)" in str(error.value)
    assert len(str(error.value).splitlines()) < 60


def test_many_lines_fold_over_their_layers():
    lines = [f"missing model.layers.{i}.a" for i in [*range(25), *range(30, 47)]] + ["b"]
    assert fold_layers(lines) == ["missing model.layers.[0-24,30-46].a", "b"]
    assert fold_layers(lines[:9]) == lines[:9]


def test_a_tied_head_stored_twice_is_accepted_if_equal(directory):
    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)

    change_weights(directory, add_head)
    assert hf.open_hf(directory).stores_tied_head
    assert "lm_head.kernel" not in weights_of(hf.load(directory))

    def change_head(tensors):
        tensors["lm_head.weight"][3, 5] += 1

    change_weights(directory, change_head)
    with pytest.raises(ValueError, match="tie_word_embeddings, but lm_head.weight differs"):
        hf.load(directory)


def test_dtypes_on_load(tmp_path):
    stored = load_file(JET / "model.safetensors")
    directory = Path(shutil.copytree(JET, tmp_path / "half"))
    halves = {
        k: x.astype(ml_dtypes.bfloat16 if "mlp" in k else np.float16) for k, x in stored.items()
    }
    save_file(halves, directory / "model.safetensors")

    kept = weights_of(hf.load(directory))
    assert kept["layers.0.mlp.up_proj.kernel"].dtype == ml_dtypes.bfloat16
    assert kept["layers.0.mixer.q_proj.kernel"].dtype == np.float16
    # The recurrence's decay stays float32 in a live model, whatever is stored or asked for.
    assert kept["layers.0.mixer.A_log"].dtype == np.float32
    np.testing.assert_array_equal(
        kept["layers.0.mixer.A_log"],
        halves["model.layers.0.self_attn.A_log"].astype(np.float32),
    )

    model = hf.load(JET, "bfloat16")
    cast = weights_of(model)
    assert model.config.dtype == "bfloat16"
    float32 = {path for path, x in cast.items() if x.dtype == np.float32}
    assert float32 == {f"layers.{i}.mixer.{n}" for i in (0, 2, 4) for n in ("A_log", "dt_bias")}
    np.testing.assert_array_equal(
        cast["layers.1.mixer.o_proj.kernel"],
        stored["model.layers.1.self_attn.o_proj.weight"].T.astype(ml_dtypes.bfloat16),
    )
    with pytest.raises(ValueError, match="dtype='float16'; expected bfloat16, float32 or None"):
        hf.load(JET, "float16")


def test_weights_land_in_their_sharding():
    mesh = make_mesh(2, 2, 2)
    whole = weights_of(hf.load(JET, "float32"))
    _, params = split(hf.load(JET, "float32", mesh=mesh))
    spread = flatten(params)
    wanted = shardings(spread, mesh)
    for path, x in spread.items():
        assert x.sharding == wanted[path], path
        np.testing.assert_array_equal(np.asarray(x), whole[path])
    kernel = spread["layers.0.mlp.up_proj.kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


class _Watched(np.ndarray):
    """Records the shape of each slice that is taken."""

    taken: list

    def __getitem__(self, index):
        part = np.asarray(self).__getitem__(index)
        self.taken.append(part.shape)
        return part


def test_only_the_slices_of_a_sharding_are_read():
    view = np.arange(64.0, dtype=np.float32).reshape(8, 8).view(_Watched)
    view.taken = []
    spec = {"mlp.up_proj.kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    where = shardings(spec, make_mesh(1, 4, 2))["mlp.up_proj.kernel"]
    placed = place(view, jax.ShapeDtypeStruct((8, 8), jnp.bfloat16, sharding=where))
    assert set(view.taken) == {(2, 4)}
    np.testing.assert_array_equal(np.asarray(placed, np.float32), np.asarray(view))


def test_a_loaded_model_does_not_lean_on_its_files(directory):
    model = hf.load(directory, "float32")
    before = weights_of(model)["embed_tokens.embedding"].copy()
    with open(directory / "model.safetensors", "r+b") as file:
        file.seek(-(2**15), 2)
        file.write(bytes(2**15))
    np.testing.assert_array_equal(weights_of(model)["embed_tokens.embedding"], before)


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_load_like_safetensors(directory, shards):
    whole = weights_of(hf.load(directory, "float32"))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i}.bin" if shards > 1 else "pytorch_model.bin"
        write_torch(directory / file, {n: tensors[n] for n in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = weights_of(hf.load(directory, "float32"))
    assert loaded.keys() == whole.keys()
    for path in whole:
        np.testing.assert_array_equal(loaded[path], whole[path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON .Expecting"),
        ("[1]", "config.json: it is not a JSON object"),
        ('{"model_type": "mamba"}', "config.json: model_type 'mamba' is not supported"),
        ('{"model_type": "gemma3"}', "'gemma3' is an image-and-text model"),
        ('{"model_type": "qwen2"}', "config.json: .*num_hidden_layers|config.json: .*has no"),
        (
            '{"model_type": "qwen2", "quantization_config": {"quant_method": "gptq"}}',
            r"quantised \(gptq\)",
        ),
    ],
)
def test_unsuitable_configs_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        hf.read_config(tmp_path)


def test_directories_without_a_config_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        hf.read_config(tmp_path)
    with pytest.raises(ValueError, match="nowhere is not a directory"):
        hf.read_config(tmp_path / "nowhere")


def test_config_text_is_the_original_as_long_as_it_is_true():
    text = (JET / "config.json").read_text()
    config = hf.read_config(JET)
    assert hf.config_text(config) == text
    assert '"norm_eps": "1e-5"' in text  # a string, kept
    assert hf.config_text(config, "float32") == text
    assert json.loads(hf.config_text(config, "bfloat16")) == json.loads(text) | {
        "torch_dtype": "bfloat16"
    }
    longer = config.replace(layer_types=(*config.layer_types, "attn"))
    assert ModelConfig.from_hf(hf.config_text(longer)) == longer
    assert json.loads(hf.config_text(longer))["num_hidden_layers"] == 7
