"""The supernet's training steps at Jet-Nemotron-2B's size on one device: JSON.

    python benchmarks/supernet.py OUT.json [--batch N] [--length N] [--steps N] [--remat NAME]

The teacher has Qwen2.5-1.5B's shapes and random weights, the linear path is gated linear attention
with a state of 4 x 192 x 384 elements a layer, as in the paper's search. Timed are the step on
sampled paths (teacher forward, student forward and backward, feature loss and KL, AdamW on the
linear paths) and the teacher-forced one, medians of their steps, beside a matrix product of the
same process. The paper's own ran at about 17,200 tokens/s a GPU (50e9 tokens in 808 H100-hours).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from jet_jax import optim, params, sharding  # noqa: E402
from jet_jax.bench import timing  # noqa: E402
from jet_jax.config import ModelConfig  # noqa: E402
from jet_jax.metrics import memory_bytes  # noqa: E402
from jet_jax.postnas import supernet, training  # noqa: E402
from jet_jax.postnas.path_optim import make_path_optimizer  # noqa: E402
from jet_jax.postnas.paths import PathLaw  # noqa: E402
from jet_jax.postnas.supernet import Supernet  # noqa: E402

ATTENTION = {"num_heads": 12, "num_kv_heads": 2, "head_dim": 128, "qkv_bias": True}
TEACHER = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "layer_types": ("attn",) * 28,
    "mixers": {"attn": ATTENTION | {"rope": {"theta": 1e6}}},
}
SMALL = {"vocab_size": 512, "intermediate_size": 256, "layer_types": ("attn",) * 3}
GLA = {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0}


def random_teacher(config: ModelConfig, key: Any) -> dict[str, Any]:
    """Stacked weights in bfloat16: matrices N(0, 0.02), norms 1, biases 0."""
    shapes = jax.eval_shape(supernet.stack, params.abstract(config)[1])

    def fill(path, x):
        name = sharding.dotted(path)
        if name.endswith("scale"):
            return jnp.ones(x.shape, jnp.bfloat16)
        if name.endswith("bias"):
            return jnp.zeros(x.shape, jnp.bfloat16)
        seed = jax.random.fold_in(key, sum(map(ord, name)))
        return 0.02 * jax.random.normal(seed, x.shape, jnp.bfloat16)

    return jax.jit(lambda: jax.tree_util.tree_map_with_path(fill, shapes))()


def timed(step: Any, state: Any, batch: Any, steps: int) -> tuple[Any, dict[str, Any]]:
    """Compiles a step with its first call, then times `steps` more."""
    start = time.perf_counter()
    state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    out: dict[str, Any] = {"compile_s": time.perf_counter() - start}
    times, losses = [], [float(metrics["loss"])]
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        times.append(time.perf_counter() - start)
    median = float(np.median(times))
    tokens = batch["tokens"].size
    out |= {"ms": 1e3 * median, "tokens_s": tokens / median, "losses": losses}
    return state, out | memory_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.json")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--remat", choices=supernet.REMATS, default="mixer", help="what a path step computes again"
    )
    parser.add_argument("--small", action="store_true", help="a few narrow layers, to try it")
    parser.add_argument("--trace", type=Path, help="folder for a profile of three path steps")
    args = parser.parse_args()
    teacher = ModelConfig(**(TEACHER | (SMALL if args.small else {})))
    net = Supernet.of(teacher, "gla", GLA)
    weights = {"linear": jax.jit(net.random_linear)(jax.random.key(1))}
    weights["teacher"] = random_teacher(teacher, jax.random.key(0))
    settings = optim.OptimConfig(lr=5e-4, schedule="constant", weight_decay=0.0)
    optimizer = make_path_optimizer(settings, 1000, {"linear": weights["linear"]}, {})
    state = training.init_state(weights, optimizer)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    shape = (args.batch, args.length)
    tokens = np.random.default_rng(0).integers(0, teacher.vocab_size, shape)
    batch = {
        "tokens": tokens.astype(np.int32),
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.broadcast_to(np.arange(args.length, dtype=np.int32), shape).copy(),
    }
    ceilings = timing.measure_ceilings(args.small, 5)
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflop_s": ceilings.matmul_tflop_s,
        "batch": args.batch,
        "length": args.length,
        "remat": args.remat,
        "teacher_parameters": teacher.param_count(),
        "linear_parameters": sum(x.size for x in jax.tree.leaves(weights["linear"])),
        # A token of the path step: teacher forward, student forward and the gradients of
        # activations, one forward each. Not counted: gradients of the linear weights, which are
        # small beside them, and what remat computes again.
        "flops_per_token": 3 * teacher.flops_per_token(args.length),
    }

    def note(name: str, result: dict[str, Any]) -> None:
        report[name] = result
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(result), flush=True)

    with jax.set_mesh(mesh):
        batch = sharding.put_batch(batch, mesh)
        step = training.make_path_step(
            net, optimizer, state, mesh, law=PathLaw(max_full=12), loss=training.PathLoss(),
            seed=0, remat=args.remat,
        )  # fmt: skip
        state, result = timed(step, state, batch, args.steps)
        note("paths", result)
        if args.trace:
            with jax.profiler.trace(str(args.trace)):
                for _ in range(3):
                    state, metrics = step(state, batch)
                jax.block_until_ready(metrics)
        align = training.make_align_step(net, optimizer, state, mesh)
        state, result = timed(align, state, batch, args.steps)
        note("align", result)


if __name__ == "__main__":
    main()
