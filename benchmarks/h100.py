"""Runs the whole project once on one GPU and measures it.

    python benchmarks/h100.py OUT [STEP ...] [--smollm DIR]

Each step writes OUT/STEP.json and prints it; without names all steps run. Steps:

  ceilings    what the card can do: a bfloat16 matrix product and a device-to-device copy
  golden      the golden models: float32 against recorded outputs (but the greedy tokens), and
              bfloat16 logits against them
  quickstart  configs/quickstart.py from start to end, as a user runs it
  train_2b    Jet-Nemotron-2B, random weights: full AdamW steps at B1 T4096
  decode_2b   Jet-Nemotron-2B, random bfloat16 weights: prefill and decode at B8, 4K context
  smollm      SmolLM2-135M from a Hugging Face directory: a greedy continuation and decoding speed

Times are medians after a warm-up; `floor` figures follow from the ceilings measured in the same
process, so run a step together with `ceilings` (it is always run first).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jet_jax  # noqa: E402
from jet_jax import metrics, optim, params, sharding, step, verify  # noqa: E402
from jet_jax.config import ModelConfig  # noqa: E402


def median_seconds(function: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a call that ends with its results on the device; two warm-ups."""
    times = []
    for i in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(function())
        if i >= 2:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings() -> dict[str, Any]:
    """A bfloat16 matrix product of 8192³ and a copy of 4 GiB, each as one call of several."""
    n, calls = 8192, 10
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))

    @jax.jit
    def product(a, b):
        return jax.lax.fori_loop(0, calls, lambda _, x: (x @ b) * jnp.bfloat16(1e-2), a)

    flops = calls * 2 * n**3 / median_seconds(lambda: product(a, b), 5)
    x = jax.random.normal(jax.random.key(2), (2**31,), jnp.bfloat16)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    rate = 2 * x.nbytes / median_seconds(lambda: copy(x), 5)
    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {
        "device": device.device_kind,
        **versions,
        "matmul_tflops": flops / 1e12,
        "copy_tb_s": rate / 1e12,
    }


def golden(ceiling: dict[str, Any]) -> dict[str, Any]:
    """Every golden model: worst float32 error, greedy tokens, and bfloat16 logits."""
    out = {}
    for folder in sorted((ROOT / "tests/golden").glob("*_small")):
        recording = dict(np.load(folder / "expected.npz"))
        recording.pop("greedy_tokens")  # many programs to compile; the CPU tests have them
        model = jet_jax.load(folder, dtype="float32")
        checks = list(verify.verify(model, recording, tolerance=2e-5))
        half = jet_jax.load(folder, dtype="bfloat16")
        logits = np.asarray(half(jnp.asarray(recording["input_ids"], jnp.int32)))
        out[folder.name] = {
            "float32_worst": max(c.error for c in checks if c.error is not None),
            "all_passed": all(c.passed for c in checks),
            "bfloat16_logits": verify.relative_error(logits, recording["logits"]),
        }
    return out


def quickstart(ceiling: dict[str, Any]) -> dict[str, Any]:
    """Wall time and losses of the quick start."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
        # This process holds most of the card's memory.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        start = time.perf_counter()
        subprocess.run([*command, f"--workdir={workdir}"], cwd=ROOT, check=True, env=env)
        seconds = time.perf_counter() - start
        valid = metrics.read_records(workdir, "valid")[-1]
        train = metrics.read_records(workdir, "train")[-1]
    return {"seconds": seconds, "valid_loss": valid["loss"], "last_train_record": train}


def model_2b(dtype: str) -> ModelConfig:
    """The exact 2B architecture."""
    from configs import jet2b

    return ModelConfig(**jet2b.get_config().model.to_dict()).replace(dtype=dtype)


def train_2b(ceiling: dict[str, Any]) -> dict[str, Any]:
    """Full training steps: float32 masters, bfloat16 compute, AdamW, remat per layer."""
    batch_size, length, policy = 1, 4096, "full"
    config = model_2b("bfloat16")
    mesh = sharding.make_mesh()
    graphdef, shapes = step.abstract_model(config, policy)
    optimizer, schedule = optim.make_optimizer(optim.OptimConfig(lr=1e-4), 1000, shapes)

    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, (batch_size, length + 1), dtype=np.int32)
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": np.ones((batch_size, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch_size, 1)),
        "loss_mask": np.ones((batch_size, length), np.float32),
    }
    with jax.set_mesh(mesh):
        weights = step.random_params(config, mesh, seed=0)
        init = jax.jit(lambda w: step.init_state(w, (), optimizer), donate_argnums=0)
        state = init(weights)
        train_step = step.make_train_step(
            graphdef, optimizer, schedule, jax.eval_shape(lambda: state), mesh, dtype=jnp.bfloat16
        )
        device_batch = sharding.put_batch(batch, mesh)
        start = time.perf_counter()
        compiled = train_step.lower(state, device_batch).compile()
        compile_seconds = time.perf_counter() - start
        losses = []

        def once():
            nonlocal state
            state, values = compiled(state, device_batch)
            losses.append(values["loss"])
            return values

        seconds = median_seconds(once, 10)
    flops = 3 * config.flops_per_token(length) * batch_size * length
    peak = metrics.peak_flops() or float("nan")
    return {
        "batch": batch_size,
        "length": length,
        "remat": policy,
        "parameters": config.param_count(),
        "compile_s": compile_seconds,
        "step_ms": seconds * 1e3,
        "tokens_per_s": batch_size * length / seconds,
        "mfu_of_989_tflops": flops / seconds / peak,
        "mfu_of_measured_matmul": flops / seconds / (ceiling["matmul_tflops"] * 1e12),
        "cudnn_attention_calls": compiled.as_text().count('custom_call_target="__cudnn$fmha'),
        "first_losses": [float(x) for x in losses[:3]],
        "peak_memory_gib": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        / 2**30,
    }


def decode_2b(ceiling: dict[str, Any]) -> dict[str, Any]:
    """Chunked prefill of 3,840 tokens a row and 240 decoded ones, eight rows."""
    rows, prompt, new = 8, 3841, 240
    config = model_2b("bfloat16")
    weights = step.random_params(config, sharding.make_mesh(), seed=0)
    weights = params.unflatten(
        {
            path: w if path.endswith(("A_log", "dt_bias")) else w.astype(jnp.bfloat16)
            for path, w in params.flatten(weights).items()
        }
    )
    graphdef, _ = params.abstract(config, jnp.bfloat16)
    generator = jet_jax.Generator(graphdef=graphdef, params=weights, lanes=rows, prefill_chunk=960)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, prompt).tolist() for _ in range(rows)]
    best = None
    for _ in range(3):
        timing = jet_jax.generation.Timing()
        out = generator.generate(prompts, new, eos_id=(), max_length=4096, timing=timing)
        assert all(len(tokens) == new for tokens in out)
        if best is None or timing.decode_s < best.decode_s:
            best = timing
    step_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
    # The states are read and written, keys and values only read.
    step_bytes += config.cache_bytes(4096, rows)
    floor = step_bytes / (ceiling["copy_tb_s"] * 1e12)
    seconds = best.decode_s / new
    prefill_flops = config.flops_per_token(prompt - 1) * rows * (prompt - 1)
    return {
        "batch": rows,
        "context": 4096,
        "decode_tokens_per_s": rows / seconds,
        "decode_step_ms": seconds * 1e3,
        "decode_floor_ms": floor * 1e3,
        "decode_fraction_of_floor": floor / seconds,
        "prefill_tokens_per_s": rows * (prompt - 1) / best.prefill_s,
        "prefill_mfu_of_measured_matmul": prefill_flops
        / best.prefill_s
        / (ceiling["matmul_tflops"] * 1e12),
    }


def smollm(ceiling: dict[str, Any], folder: str) -> dict[str, Any]:
    """The pretrained model: what it says, and how fast."""
    from jet_jax.data import load_tokenizer

    model = jet_jax.load(folder, dtype="bfloat16")
    tokenizer = load_tokenizer(folder)
    prompt = "The capital of France is"
    tokens = jet_jax.generate(model, [tokenizer.encode(prompt)], max_new_tokens=16)[0]
    out: dict[str, Any] = {"prompt": prompt, "continuation": tokenizer.decode(tokens)}
    rows, new, best = 64, 240, float("inf")
    generator = jet_jax.Generator(model, lanes=rows)
    for _ in range(3):
        timing = jet_jax.generation.Timing()
        generator.generate([tokenizer.encode(prompt)] * rows, new, eos_id=(), timing=timing)
        best = min(best, timing.decode_s)
    # Each step reads all weights; the short texts' keys and values are small beside them.
    floor = 2 * model.config.param_count() / (ceiling["copy_tb_s"] * 1e12)
    out |= {
        "batch": rows,
        "decode_tokens_per_s": rows * new / best,
        "decode_step_ms": best / new * 1e3,
        "decode_floor_ms": floor * 1e3,
    }
    return out


STEPS = {
    "golden": golden,
    "quickstart": quickstart,
    "train_2b": train_2b,
    "decode_2b": decode_2b,
    "smollm": smollm,
}


def main() -> None:
    """Runs the steps and writes one JSON file each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the JSON files")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--smollm", default="models/smollm2", help="SmolLM2's directory")
    args = parser.parse_args()
    unknown = [name for name in args.steps if name not in STEPS]
    if unknown:
        parser.error(f"unknown step {unknown[0]!r}; steps: {', '.join(STEPS)}")
    if jax.default_backend() != "gpu":
        sys.exit("h100.py: this needs an NVIDIA GPU")
    args.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, values: dict[str, Any]) -> None:
        (args.out / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n")
        print(name, json.dumps(values, indent=2), flush=True)

    ceiling = ceilings()
    write("ceilings", ceiling)
    for name in args.steps or STEPS:
        extra = (args.smollm,) if name == "smollm" else ()
        write(name, STEPS[name](ceiling, *extra))
        jax.clear_caches()


if __name__ == "__main__":
    main()
