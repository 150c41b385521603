"""Decoding and prefill speed of a config on the device that is there, measured once and kept.

The model's weights are random and its cache is filled with made-up numbers: speed depends on
shapes. What is timed are the compiled functions that generation itself uses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jet_jax
import kernels_pallas
from jet_jax.bench.timing import median_seconds
from jet_jax.cache import Cache
from jet_jax.config import ModelConfig
from jet_jax.decode import DeviceFunctions, Lanes
from jet_jax.option_checks import require_positive
from jet_jax.params import abstract
from jet_jax.prompts import stop_ids
from jet_jax.sampling import make_sampling

STEPS = 16  # tokens decoded a call, as in generation
_ENDLESS = 2**30


def measure(
    config: ModelConfig,
    *,
    context: int,
    batch: int,
    prefill_length: int,
    chunk: int,
    prefill_batch: int = 1,
    repeats: int = 5,
    directory: str | os.PathLike | None = None,
    again: bool = False,
) -> dict[str, Any]:
    """Measures throughput with random weights in the config's dtype, after compiling and warming.

    Args:
      config: the hybrid.
      context: tokens that the cache of each sequence holds when decoding begins; its length is
        set, nothing is prefilled.
      batch: sequences that decode at once, greedily.
      prefill_length: tokens of a prompt.
      chunk: tokens of a prompt that are prefilled at once.
      prefill_batch: prompts that are prefilled at once.
      repeats: the median of so many timings counts.
      directory: where results are kept, a JSON file each; None keeps none. A result counts for
        the same config and sizes, kind of device, versions and sources of the model's code.
      again: measures although there is a result, and replaces it.

    Returns:
      `decode_tokens_s` and `prefill_tokens_s` (tokens a second of all sequences together),
      `cache_bytes` of `batch` sequences at `context`, `parameters`, `device`, the sizes given, and
      `note`. What ran out of memory is None and `note` says so; such a result is not kept.

    Raises:
      ValueError: for sizes below 1.
    """
    sizes = {
        "context": context,
        "batch": batch,
        "prefill_length": prefill_length,
        "chunk": chunk,
        "prefill_batch": prefill_batch,
        "repeats": repeats,
    }
    for name, value in sizes.items():
        require_positive(name, value)
    key = _identity() | sizes | {"config": config.replace(hf_json=None).to_dict()}
    path = None if directory is None else Path(directory) / f"{_digest(key)}.json"
    if path is not None and path.exists() and not again:
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    result: dict[str, Any] = {"decode_tokens_s": None, "prefill_tokens_s": None}
    result |= {"cache_bytes": config.cache_bytes(context, batch)}
    result |= {"parameters": config.param_count(), "device": key["device"], **sizes, "note": None}
    notes: list[str] = []
    model = _unless_full("weights", notes, lambda: _random_model(config))
    if model is not None:
        for name, rate, arguments in (
            ("decode", decode_rate, (context, batch)),
            ("prefill", prefill_rate, (prefill_length, chunk, prefill_batch)),
        ):
            run = partial(rate, *model, *arguments, repeats)
            result[f"{name}_tokens_s"] = _unless_full(name, notes, run)
    if notes:
        result["note"] = "; ".join(notes)
    elif path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.incomplete")
        unfinished.write_text(json.dumps({"result": result, "key": key}, indent=1) + "\n")
        os.replace(unfinished, path)
    return result


def decode_rate(
    functions: DeviceFunctions, params: Any, context: int, batch: int, repeats: int
) -> float:
    """Tokens a second of `batch` sequences that have `context` tokens in their caches.

    Every timed call decodes `STEPS` tokens a sequence from that context on.
    """
    config = functions.config
    cache, lanes = _start(functions, batch, context + STEPS)
    lanes = dataclasses.replace(lanes, remaining=jnp.full((batch,), _ENDLESS, jnp.int32))
    rest = (jax.random.key(0), make_sampling(config.vocab_size), stop_ids((), config))

    def call():
        nonlocal cache, lanes
        cache = Cache(cache.layers, jnp.full((batch,), context, jnp.int32))
        cache, lanes, tokens = functions.decode(params, cache, lanes, *rest, steps=STEPS)
        return tokens

    return STEPS * batch / median_seconds(call, repeats)


def prefill_rate(
    functions: DeviceFunctions, params: Any, length: int, chunk: int, batch: int, repeats: int
) -> float:
    """Tokens a second of `batch` prompts of `length` tokens, `chunk` of each at a time."""
    starts = range(0, length, chunk)
    cache, _ = _start(functions, batch, len(starts) * chunk)
    tokens = jax.random.randint(jax.random.key(1), (batch, chunk), 0, functions.config.vocab_size)
    counts = [np.full(batch, min(chunk, length - at), np.int32) for at in starts]

    def call():
        nonlocal cache
        cache = Cache(cache.layers, jnp.zeros((batch,), jnp.int32))
        for count in counts:
            cache = functions.prefill(params, cache, tokens, count)
        return cache.length + 0  # the cache itself is donated to the next call

    return length * batch / median_seconds(call, repeats)


def _start(functions: DeviceFunctions, batch: int, max_length: int) -> tuple[Cache, Lanes]:
    """Idle lanes and a cache of small numbers that differ, as zeros would draw less power."""

    def fill(x: Array) -> Array:
        index = sum(
            (dim + 1) * jax.lax.broadcasted_iota(jnp.float32, x.shape, dim) for dim in range(x.ndim)
        )
        return (0.1 * jnp.sin(index)).astype(x.dtype)

    @jax.jit
    def start():
        cache, lanes = functions.start(lanes=batch, max_length=max_length)
        return Cache(jax.tree.map(fill, cache.layers), cache.length), lanes

    return start()


def _unless_full(name: str, notes: list[str], run: Callable[[], Any]) -> Any:
    """What `run` returns; None, and a note, where the device's memory does not suffice."""
    try:
        return run()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
    notes.append(f"{name}: out of memory")
    return None


def _random_model(config: ModelConfig) -> tuple[DeviceFunctions, Any]:
    """Functions of the config, and normal weights with a deviation of 0.02, each in its dtype."""
    graphdef, shapes = abstract(config, jnp.dtype(config.dtype))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # One by one: a program of them all would compile far longer than these, few of which differ.
    weights = [_normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)]
    return DeviceFunctions(graphdef, config), tree.unflatten(weights)


@partial(jax.jit, static_argnums=(1, 2))
def _normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


def _identity() -> dict[str, str]:
    """The device's kind, versions, and a digest of the sources that decide the speed."""
    device = jax.devices()[0]
    kind = device.device_kind
    sources = hashlib.sha256()
    roots = [Path(str(module.__file__)).parent for module in (jet_jax, kernels_pallas)]
    folders = (roots[0] / "mixers", roots[0] / "models", roots[1])
    files = [path for folder in folders for path in folder.rglob("*.py")]
    for path in sorted([*files, roots[0] / "decode.py"]):
        sources.update(path.read_bytes())
    return {
        "device": f"{kind}, {os.cpu_count()} cores" if device.platform == "cpu" else kind,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": str(device.client.platform_version),
        "sources": sources.hexdigest()[:16],
    }


def _digest(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
