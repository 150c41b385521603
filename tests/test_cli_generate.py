"""`jet-jax generate` on a tiny model with the quick start's tokenizer."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from tiny import tiny_config

import jet_jax
from jet_jax import prompt_text
from jet_jax.cli import main
from jet_jax.commands import generate as command
from jet_jax.data.tokenizer import load_tokenizer
from jet_jax.detokenize import Detokenizer
from jet_jax.generation import Generator, Piece
from jet_jax.models.lm import HybridLM

TOKENIZER = Path(__file__).parents[1] / "data" / "quickstart" / "tokenizer"
PROMPTS = ["It was a café", "The 北京"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def model():
    config = tiny_config(vocab_size=2048, initializer_range=0.5, layer_types=("attn",))
    return HybridLM(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """The model as a Hugging Face and as an Orbax directory, the first without a tokenizer too."""
    folder = tmp_path_factory.mktemp("models")
    jet_jax.save(model, folder / "hf", tokenizer_dir=TOKENIZER)
    jet_jax.save(model, folder / "bare")
    jet_jax.save(model, folder / "orbax", format="orbax", tokenizer_dir=TOKENIZER)
    return folder


def continuations(model, tokenizer, prompts, new_tokens, **options):
    ids = [tokenizer.encode(prompt).tolist() for prompt in prompts]
    eos = prompt_text.ending_ids(TOKENIZER, tokenizer, model.config)
    out = jet_jax.generate(model, ids, new_tokens, eos_id=eos, **options)
    return [tokenizer.decode(i + o)[len(p) :] for p, i, o in zip(prompts, ids, out, strict=True)]


def flags(prompts=PROMPTS, new_tokens=40):
    prompts = [word for prompt in prompts for word in ("--prompt", prompt)]
    return [*prompts, "--max-new-tokens", str(new_tokens)]


def test_prints_prompts_and_continuations_in_order(folder, model, tokenizer, capsys):
    assert main(["generate", str(folder / "hf"), *flags(), "--stats"]) == 0
    out, err = capsys.readouterr()
    texts = continuations(model, tokenizer, PROMPTS, 40)
    assert out == f"{PROMPTS[0]}{texts[0]}\n---\n{PROMPTS[1]}{texts[1]}\n"
    assert texts[0] != texts[1] and all(texts)
    count = sum(tokenizer.encode(prompt).size for prompt in PROMPTS)
    rate = r"in \d+\.\d\d s \([\d,.]+ tokens/s\)"
    told = re.search(rf"prefill {count} tokens {rate}, decode (\d+) tokens {rate}, compile", err)
    model_ids = [tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
    expected = sum(map(len, jet_jax.generate(model, model_ids, 40, eos_id=tokenizer.eos_id)))
    assert told and int(told[1]) == expected
    assert err.count("\n") == 1  # nothing else, such as complaints about the model's type


def test_samples_by_seed_from_a_converted_model(folder, model, tokenizer, tmp_path, capsys):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPTS[1] + "\n", encoding="utf-8")
    sampled = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--seed", "3"]
    source = ["--prompt-file", str(path), "--max-new-tokens", "20", "--no-echo"]
    assert main(["generate", str(folder / "orbax"), *source, *sampled]) == 0
    options = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "key": jax.random.key(3)}
    assert capsys.readouterr().out == (
        continuations(model, tokenizer, PROMPTS[1:], 20, **options)[0] + "\n"
    )


def test_text_is_printed_as_soon_as_it_may(tokenizer, capsys):
    ids = [tokenizer.encode(text).tolist() for text in (" one two", " three", " four")]
    printer = command.OrderedPrinter(["A", "B", "C"], [Detokenizer(tokenizer.decode) for _ in ids])
    seen = [capsys.readouterr().out]
    for piece in (
        Piece(1, ids[1], False),
        Piece(0, ids[0], False),
        Piece(1, [], True),
        Piece(0, [], True),
        Piece(2, ids[2], True),
    ):
        printer.add(piece)
        seen.append(capsys.readouterr().out)
    assert seen == ["A", "", " one two", "", "\n---\nB three\n---\nC", " four\n"]


def test_ctrl_c_ends_without_a_traceback(folder, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        yield Piece(0, [5], False)
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream", interrupted)
    assert main(["generate", str(folder / "hf"), *flags()]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bare", *flags()], "has no tokenizer; name a directory that has: --tokenizer DIR"),
        (["nowhere", *flags()], "nowhere does not exist"),
        (["hf"], "no prompt; give --prompt"),
        (["hf", "--prompt", ""], "the prompt is empty"),
        (["hf", *flags(), "--top-k", "5"], "set --temperature above 0"),
        (["hf", *flags(), "--temperature", "-1"], "temperature=-1.0 must be"),
        (["hf", *flags(), "--temperature", "1", "--top-p", "2"], "top_p=2.0 must lie in"),
        (["hf", *flags(new_tokens=0)], "max_new_tokens=0 must be at least 1"),
        (["hf", *flags(), "--chat"], "no chat template; leave out --chat"),
        (["hf", "--prompt-file", "nowhere.txt"], "nowhere.txt"),
        (["hf", "--prompt-file", "latin1.txt"], "latin1.txt is not UTF-8"),
    ],
)
def test_bad_input_is_told_in_a_line(folder, arguments, message, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("jet_jax.io.load", lambda *_, **__: pytest.fail("the weights were read"))
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    assert main(["generate", *arguments]) == 1
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1
    assert err.startswith("jet-jax generate: error: ")


def test_tokenizer_of_another_model(tmp_path, capsys):
    config = tiny_config(vocab_size=300, layer_types=("attn",))
    jet_jax.save(HybridLM(config, rngs=nnx.Rngs(0)), tmp_path / "hf")
    arguments = ["generate", str(tmp_path / "hf"), *flags(), "--tokenizer", str(TOKENIZER)]
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert "has 2048 token ids, but the model's vocab_size is 300" in err


def test_tokenizer_beside_a_config_that_transformers_refuses(tmp_path, capfd):
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    golden = Path(__file__).parent / "golden" / "jet_nemotron_small" / "config.json"
    shutil.copy(golden, tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 2048
    assert capfd.readouterr().err == ""


def test_every_id_that_ends_a_text(tokenizer, tmp_path):
    config = tiny_config(vocab_size=2048, eos_token_id=(7, 9))
    assert prompt_text.ending_ids(tmp_path, tokenizer, config) == [0, 7, 9]
    named = {"eos_token_id": [7, 1500]}
    (tmp_path / "generation_config.json").write_text(json.dumps(named))
    assert prompt_text.ending_ids(tmp_path, tokenizer, config) == [0, 7, 9, 1500]


def test_chat_template(tmp_path):
    pytest.importorskip("jinja2", reason="chat templates need jinja2")
    shutil.copytree(TOKENIZER, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    tokenizer = load_tokenizer(tmp_path)
    ids = prompt_text.encode(tokenizer, "hello", chat=True)
    expected = "user: hello<|endoftext|>assistant:"
    assert tokenizer.decode(ids, skip_special=False) == expected


def test_help_and_wrong_usage_import_no_jax():
    code = (
        "import sys, jet_jax\nfrom jet_jax.cli import main\n"
        "for words in (['--help'], ['generate', '--help'], ['frobnicate']):\n"
        "    try: main(words)\n"
        "    except SystemExit as e: print(e.code)\n"
        "print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("2\nFalse\n"), done.stdout + done.stderr
    assert "--max-new-tokens" in done.stdout and "generate" in done.stdout
    assert "invalid choice: 'frobnicate'" in done.stderr
