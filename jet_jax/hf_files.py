"""The files of a Hugging Face directory beside the weights: config, tokenizer and the like."""

import json
import os
import shutil
from pathlib import Path

from jet_jax.config import ModelConfig

# Files of a Hugging Face directory, besides config and weights, that belong to the model.
_COMPANION_SUFFIXES = (".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt", ".vocab")
_COMPANION_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")


def read_config(directory: str | os.PathLike) -> ModelConfig:
    """Reads the config.json of a Hugging Face directory.

    Args:
      directory: the directory.

    Returns:
      The model, which remembers the file's text.

    Raises:
      ValueError: there is no such directory or file, it is not JSON, or it describes a model that
        is not supported; the message names the file.
    """
    path = Path(directory) / "config.json"
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is not a directory")
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json; expected a Hugging Face directory")
    text = path.read_text(encoding="utf-8")
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if values.get("quantization_config"):
            method = values["quantization_config"].get("quant_method", "unknown")
            raise ValueError(
                f"its weights are quantised ({method}), which is not supported; use the original "
                "model in bfloat16, float16 or float32"
            )
        if values.get("model_type") == "gemma3":
            raise ValueError(
                "model_type 'gemma3' is an image-and-text model; supported is its text part, "
                "'gemma3_text', in a directory of its own"
            )
        return ModelConfig.from_hf(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_text(config: ModelConfig, dtype: str | None = None) -> str:
    """Gives the text of a config.json: the original one, if it still describes the model.

    Args:
      config: the model.
      dtype: the weights' dtype to be named; None leaves the original's word for it.

    Returns:
      The text.
    """
    text = config.hf_json
    if text is None or ModelConfig.from_hf(text) != config:
        text = json.dumps(config.to_hf(), indent=2) + "\n"
    values = json.loads(text)
    keys = [key for key in ("dtype", "torch_dtype") if key in values]
    if dtype is None or all(values[key] == dtype for key in keys):
        return text
    return json.dumps(values | dict.fromkeys(keys, dtype), indent=2) + "\n"


def copy_companions(source: str | os.PathLike, destination: str | os.PathLike) -> list[str]:
    """Copies what belongs to a model besides config and weights: tokenizer, generation config, ….

    Args:
      source: a Hugging Face directory.
      destination: where to; made if there is something to copy.

    Returns:
      The names of the files copied.
    """
    copied = []
    for path in sorted(Path(source).iterdir()):
        wanted = path.suffix in _COMPANION_SUFFIXES or path.stem in _COMPANION_NAMES
        is_own = path.name == "config.json" or path.name.endswith(".index.json")
        if path.is_file() and wanted and not is_own and not path.name.startswith("."):
            Path(destination).mkdir(exist_ok=True)
            shutil.copyfile(path, Path(destination) / path.name)
            copied.append(path.name)
    return copied
