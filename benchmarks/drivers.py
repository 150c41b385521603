"""The gated delta rule's kernels by Pallas and by Triton proper, beside each other.

    python benchmarks/drivers.py [--batch B] [--length T] [--heads H] [--key K] [--value V]
                                 [--json FILE]

Needs the extra `triton` and a Hopper GPU, else says so in one line. Every kernel's results are
compared before both are timed; what drivers.py takes from Triton is what is faster here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from kernels_pallas.gated_delta_rule import drivers  # noqa: E402
from kernels_pallas.gated_delta_rule.blocks import CHUNK, find_blocks  # noqa: E402
from kernels_pallas.gated_delta_rule.gates import gate_rows  # noqa: E402
from kernels_pallas.gated_delta_rule.scores import scores  # noqa: E402

TOLERANCE = 1e-3  # relative; both round the same operands to bfloat16, but not always alike


def inputs(batch: int, length: int, heads: int, key_width: int, width: int) -> dict[str, Any]:
    """Makes every kernel's inputs from random queries, keys, values and gates."""
    keys = jax.random.split(jax.random.key(0), 7)
    q, k = (
        jax.nn.silu(jax.random.normal(x, (batch, length, heads, key_width))).astype(jnp.bfloat16)
        for x in keys[:2]
    )
    v, do = (
        jax.random.normal(x, (batch, length, heads, width)).astype(jnp.bfloat16) for x in keys[2:4]
    )
    decay = -(jax.random.uniform(keys[4], (batch, length, heads)) ** 3)
    gates = gate_rows(decay, jax.random.uniform(keys[5], (batch, length, heads)), CHUNK)
    blocks, run = find_blocks("gpu", key_width), drivers.kernels("pallas")
    s = scores(q, k, gates, blocks=blocks, scale=key_width**-0.5, use_qk_l2norm=True)
    state = 0.1 * jax.random.normal(keys[6], (batch, heads, width, key_width))
    walk = (q, k, v, s, gates.from_start, state)
    back = (q, k, do, s, gates.from_start, state)
    walked = run.walk("states", *walk, blocks=blocks)
    walked_back = run.walk_back(*back, store=True, blocks=blocks)
    gradients = (q, k, gates, walked.news, walked_back.v, do, walked.states, walked_back.states)
    return {"walk": walk, "walk_back": back, "gradients": gradients}


def calls(driver: str, key_width: int) -> Iterator[tuple[str, str, Callable[..., Any]]]:
    """Yields every kernel of a driver: a name, whose inputs it takes, and the function."""
    run, blocks = drivers.kernels(driver), find_blocks("gpu", key_width)
    for kind in ("output", "states", "final", "homogeneous"):
        yield f"walk {kind}", "walk", lambda *a, kind=kind: run.walk(kind, *a, blocks=blocks)
    for store, name in ((True, "walk back"), (False, "walk back final")):
        yield (
            name,
            "walk_back",
            lambda *a, store=store: run.walk_back(*a, store=store, blocks=blocks),
        )
    options: dict[str, Any] = dict(scale=key_width**-0.5, use_qk_l2norm=True, dtype=jnp.bfloat16)
    yield "gradients", "gradients", lambda *a: run.gradients(*a, blocks=blocks, **options)


def milliseconds(run: Any, arrays: tuple[Any, ...], calls: int = 20, repeats: int = 5) -> float:
    """Times calls that follow each other; the median of some such runs, a call."""
    jax.block_until_ready(run(*arrays))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = run(*arrays)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


@jax.jit
def error(got: jax.Array, want: jax.Array) -> jax.Array:
    """Relative Frobenius norm of a difference."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    return jnp.linalg.norm((got - want).ravel()) / (jnp.linalg.norm(want.ravel()) + 1e-30)


def obstacle(key_width: int) -> str | None:
    """Says what keeps Triton from running here, or None."""
    blocks = dataclasses.replace(find_blocks("gpu", key_width), driver="triton")
    try:
        drivers.choose(blocks, jnp.bfloat16, key_width)
    except ValueError as error:
        return str(error)
    return None


def main(arguments: list[str] | None = None) -> None:
    """Checks and times the kernels."""
    parser = argparse.ArgumentParser(description="kernels by Pallas and by Triton")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--key", type=int, default=96, choices=drivers.KEY_WIDTHS)
    parser.add_argument("--value", type=int, default=256)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    if options.length % CHUNK or options.value % 64:
        parser.error(f"--length must be a multiple of {CHUNK} and --value of 64")
    if (reason := obstacle(options.key)) is not None:
        print(f"drivers: skipped: {reason}")
        return
    shape = options.batch, options.length, options.heads, options.key, options.value
    arrays = jax.jit(inputs, static_argnums=range(5))(*shape)
    rows = []
    pairs = zip(calls("pallas", options.key), calls("triton", options.key), strict=True)
    for (name, takes, pallas), (_, _, triton) in pairs:
        old, new = jax.jit(pallas), jax.jit(triton)
        differences = jax.tree.map(error, new(*arrays[takes]), old(*arrays[takes]))
        worst = max(float(x) for x in jax.tree.leaves(differences))
        if not worst < TOLERANCE:
            sys.exit(f"{name}: relative error {worst} of Triton's to Pallas's")
        times = milliseconds(old, arrays[takes]), milliseconds(new, arrays[takes])
        rows.append(dict(kernel=name, pallas_ms=times[0], triton_ms=times[1], error=worst))
        print(f"{name:16s} Pallas {times[0]:.3f} ms, Triton {times[1]:.3f}, error {worst:.1e}")
    if options.json is not None:
        head = dict(device=jax.devices()[0].device_kind, shape=shape)
        options.json.write_text(json.dumps(head | dict(rows=rows), indent=1) + "\n")


if __name__ == "__main__":
    main()
