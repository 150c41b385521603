"""`jet-jax info`: layers, parameters, cache size and FLOPs of a config or a model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from jet_jax.cache_parts import MIB, kept, layer_bytes, rounded_mib
from jet_jax.config import ModelConfig
from jet_jax.mixer_options import AttentionOptions

CONTEXTS = tuple(2**n * 1024 for n in range(2, 9))  # 4K to 256K tokens
LONG = 65536  # the context at which the paper states cache sizes


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "info",
        help="layers, parameters, cache size and FLOPs of a config or model",
        description="Describes a model without building it: layer pattern, options, parameters, "
        "decoding cache and FLOPs a token, against the same model with full attention throughout.",
    )
    parser.add_argument(
        "model",
        metavar="CONFIG_OR_MODEL",
        help="configs/X.py (or configs/X.py:ARG), a config.json, or a model directory",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def read_config(path: str) -> ModelConfig:
    """The model config of a config file, a config.json or a model directory.

    Args:
      path: a Python file with `get_config(arg)`, optionally followed by `:ARG`; a JSON file in the
        Hugging Face format; or any directory that `jet_jax.load` takes.

    Raises:
      ValueError: there is no such file, or it describes no model.
    """
    name, _, argument = path.partition(":")
    if name.endswith(".py"):
        return _from_python(Path(name), argument)
    if path.endswith(".json"):
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist")
        return ModelConfig.from_hf(Path(path).read_text(encoding="utf-8"))
    from jet_jax.io import load_config

    return load_config(path)


def _from_python(path: Path, argument: str) -> ModelConfig:
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config()")
    config = module.get_config(argument) if argument else module.get_config()
    model = config.get("model")
    if not model and config.get("init_from"):
        from jet_jax.io import load_config

        return load_config(config.init_from)
    if not model:
        raise ValueError(f"{path}: get_config() has no 'model' section")
    return ModelConfig.from_dict(model.to_dict() if hasattr(model, "to_dict") else model)


def all_attention(config: ModelConfig) -> ModelConfig | None:
    """The same model with full attention in every layer; None if it has no attention at all."""
    mixers = dict(config.mixers)
    options = mixers.get("attn") or mixers.get("swa")
    if not isinstance(options, AttentionOptions):
        return None
    options = dataclasses.replace(options, window_size=None)
    return config.replace(layer_types=("attn",) * config.num_layers, mixers={"attn": options})


def layer_pattern(config: ModelConfig) -> str:
    """The layer types in order, runs shortened: "14 jet, attn, 4 jet"."""
    runs = ((kind, len(list(run))) for kind, run in groupby(config.layer_types))
    return ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in runs)


def parameter_groups(config: ModelConfig) -> dict[str, int]:
    """Parameters by group; the values add up to `config.param_count()`."""
    embedding = config.vocab_size * config.hidden_size
    mlp = 3 * config.hidden_size * config.intermediate_size
    out = {"embedding": embedding}
    if not config.tie_word_embeddings:
        out["head"] = embedding
    for kind in Counter(config.layer_types):
        out[f"{kind} mixers"] = config.mixer_params(kind)
    out["MLPs"] = config.num_layers * mlp
    out["norms"] = config.param_count() - sum(out.values())
    return out


def describe(config: ModelConfig) -> dict[str, Any]:
    """Everything that the command prints, as JSON-safe values; bytes and FLOPs are plain numbers.

    Args:
      config: the model.

    Returns:
      `layers`, `options`, `parameters` (by group, with `total`), `contexts` and, a number for each
      context, `cache_bytes` and `flops_per_token` of one sequence, with the same under
      `all_attention` where the model has attention options. `cache_parts` has, for each kind of
      layer, what one `keeps` and the `bytes` of all of them at each context, which add up to
      `cache_bytes`; `cache_rounded_mib` the MiB with each layer's rounded to whole ones.
    """
    full = all_attention(config)

    def costs(c: ModelConfig) -> dict[str, list[int | float]]:
        return {
            "cache_bytes": [c.cache_bytes(context) for context in CONTEXTS],
            "flops_per_token": [c.flops_per_token(context) for context in CONTEXTS],
        }

    return {
        "layers": list(config.layer_types),
        "pattern": layer_pattern(config),
        "options": {kind: dataclasses.asdict(options) for kind, options in config.mixers},
        "parameters": parameter_groups(config) | {"total": config.param_count()},
        "contexts": list(CONTEXTS),
        **costs(config),
        "cache_parts": {
            kind: {
                "keeps": kept(config, kind),
                "bytes": [n * layer_bytes(config, kind, context) for context in CONTEXTS],
            }
            for kind, n in Counter(config.layer_types).items()
        },
        "cache_rounded_mib": [rounded_mib(config, context) for context in CONTEXTS],
        "all_attention": None if full is None else costs(full),
    }


def _flat_options(options: Any) -> str:
    """The options that are set, "name value", nested ones in parentheses."""
    parts = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            changed = (
                f.name for f in dataclasses.fields(value) if getattr(value, f.name) != f.default
            )
            inner = ", ".join(f"{name} {getattr(value, name)}" for name in changed)
            parts.append(f"{field.name} ({inner or 'default'})")
        elif value is not None and value is not False:
            parts.append(field.name if value is True else f"{field.name} {value}")
    return ", ".join(parts)


def _print(title: str, config: ModelConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = describe(config)

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_row("layers", f"{config.num_layers}: {facts['pattern']}")
    counts = Counter(config.layer_types)
    for kind, options in config.mixers:
        table.add_row(f"{kind} × {counts[kind]}", _flat_options(options))
    sizes = f"hidden {config.hidden_size}, MLP {config.intermediate_size} ({config.hidden_act})"
    tied = "tied" if config.tie_word_embeddings else "untied"
    table.add_row("sizes", f"{sizes}, vocabulary {config.vocab_size} ({tied} head)")
    table.add_row("number formats", f"compute {config.dtype}, recurrent state {config.state_dtype}")
    console.print(table)

    table = Table("parameters", title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    total = config.param_count()
    for name, count in facts["parameters"].items():
        if name == "total":
            table.add_section()
        table.add_row(name, f"{count:,}", f"{100 * count / total:.1f} %")
    console.print(table)

    table = Table("context", title_justify="left")
    full = facts["all_attention"]
    columns = ["cache MiB", "GFLOPs a token"]
    if full:
        columns = ["cache MiB", "all attention", "ratio", "GFLOPs a token", "all attention"]
    for column in columns:
        table.add_column(column, justify="right")
    for i, context in enumerate(facts["contexts"]):
        cache, flops = facts["cache_bytes"][i], facts["flops_per_token"][i]
        row = [f"{cache / MIB:,.2f}", f"{flops / 1e9:,.2f}"]
        if full:
            of_full = full["cache_bytes"][i]
            row[1:1] = [f"{of_full / MIB:,.2f}", f"{of_full / cache:.1f}×"]
            row.append(f"{full['flops_per_token'][i] / 1e9:,.2f}")
        table.add_row(f"{context // 1024}K", *row)
    console.print(table)
    console.print(
        "FLOPs are a forward pass, averaged over a causal sequence of that length; training takes "
        "three times as many."
    )

    at = CONTEXTS.index(LONG)
    table = Table("cache of one sequence", "a layer keeps, of T tokens", title_justify="left")
    table.add_column(f"MiB at {LONG // 1024}K", justify="right")
    for kind, part in facts["cache_parts"].items():
        table.add_row(f"{kind} × {counts[kind]}", part["keeps"], f"{part['bytes'][at] / MIB:,.2f}")
    table.add_section()
    table.add_row("total", "", f"{facts['cache_bytes'][at] / MIB:,.2f}")
    console.print(table)
    console.print(
        f"{facts['cache_rounded_mib'][at]:,} MiB with each layer's cache rounded to whole MiB, "
        "which is how the MB of arXiv 2508.15884 come out."
    )


def run(args: argparse.Namespace) -> int:
    """Runs the subcommand; returns 0. Raises ValueError for what is no config or model."""
    config = read_config(args.model)
    if args.json:
        print(json.dumps({"model": args.model, **describe(config)}, indent=1))
    else:
        _print(args.model, config)
    return 0
