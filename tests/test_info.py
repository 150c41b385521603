"""`jet-jax info` on config files, config.json, model directories and what is none of these."""

import json
from pathlib import Path

import pytest

from jet_jax.cli import main

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"


def info(capsys, path):
    assert main(["info", str(path), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_jet_2b(capsys):
    """The published size and cache: 157.67 MiB for one sequence of 64K tokens."""
    facts = info(capsys, ROOT / "configs" / "jet2b.py")
    assert facts["pattern"] == "14 jet, attn, 4 jet, attn, 2 swa, 6 jet"
    parameters = facts["parameters"]
    assert parameters.pop("total") == sum(parameters.values()) == 1_964_806_208
    assert parameters["embedding"] == 151936 * 1536
    assert parameters["jet mixers"] == 24 * 23_052_568
    assert parameters["norms"] == 57 * 1536
    at = facts["contexts"].index(65536)
    assert round(facts["cache_bytes"][at] / 2**20, 2) == 157.67
    # Keys and values of 28 layers, 2 heads of 128, 2 bytes each.
    assert facts["all_attention"]["cache_bytes"][at] == 2 * 65536 * 28 * 2 * 128 * 2
    assert facts["flops_per_token"] == sorted(facts["flops_per_token"])


def test_printed_tables(capsys):
    assert main(["info", str(ROOT / "configs" / "jet2b.py")]) == 0
    out = capsys.readouterr().out
    for text in ("1,964,806,208", "157.67", "1,792.00", "11.4×", "jet × 24", "head_dim 96", "256K"):
        assert text in out, text


def test_models_on_disk(tmp_path, capsys):
    """A directory, its config.json and the converted model say the same."""
    source = GOLDEN / "jet_nemotron_small"
    converted = tmp_path / "orbax"
    assert main(["convert", str(source), str(converted)]) == 0
    capsys.readouterr()
    facts = [info(capsys, p) for p in (source, source / "config.json", converted)]
    assert len({f.pop("model") for f in facts}) == 3
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["options"]["jet"]["expand_v"] == 2.6666666667


def test_untied_head_and_no_attention(tmp_path, capsys):
    (tmp_path / "only_jet.py").write_text(
        "def get_config(arg='2'):\n"
        "    jet = {'num_heads': 2, 'head_dim': 8, 'generator_reduction': 4}\n"
        "    model = dict(vocab_size=50, hidden_size=16, intermediate_size=32,\n"
        "                 layer_types=('jet',) * int(arg), mixers={'jet': jet},\n"
        "                 tie_word_embeddings=False)\n"
        "    return {'model': model}\n"
    )
    path = tmp_path / "only_jet.py"
    facts = info(capsys, path)
    assert facts["parameters"]["head"] == 50 * 16 and facts["all_attention"] is None
    assert len(set(facts["cache_bytes"])) == 1  # whatever the context
    assert info(capsys, f"{path}:5")["pattern"] == "5 jet"
    assert main(["info", str(path)]) == 0
    assert "all attention" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("gone.py", None, "does not exist"),
        ("gone.json", None, "does not exist"),
        ("empty.py", "x = 1", "defines no get_config()"),
        ("train.py", "def get_config(): return {'steps': 1}", "has no 'model' section"),
        ("config.json", '{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        (".", None, "holds no model"),
    ],
)
def test_errors(tmp_path, capsys, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    assert main(["info", str(path)]) == 1
    assert message in capsys.readouterr().err


def test_a_config_that_starts_from_a_model(capsys):
    golden = GOLDEN / "qwen2_small"
    facts = info(capsys, f"{ROOT / 'configs' / 'finetune.py'}:{golden}")
    assert facts["parameters"] == info(capsys, golden)["parameters"]
