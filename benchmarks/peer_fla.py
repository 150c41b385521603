"""PyTorch peers of `jet-jax bench kernels`: flash-linear-attention and a compiled convolution.

    python benchmarks/peer_fla.py ROWS.json     (as benchmarks/kernels.py does)

Needs an NVIDIA GPU, torch, flash-linear-attention 0.6.0 (with fla-core) and einops. ROWS.json is a
list of {"name", "op", "what", "sizes", ...} as `jet-jax bench kernels --json` writes; the answer is
one JSON object a line, after each row, the last one whole: versions, and for each row "ms" or a
"note".

  gated_delta_rule   chunk_gated_delta_rule, l2-normalisation in the kernel, no states returned;
                     backward gives the gradients of q, k, v, g and beta
  gated_delta_step   fused_recurrent_gated_delta_rule with T = 1, as a CUDA graph of 20 steps, else
                     Python's time would be measured
  dynamic_conv       a cuBLAS product for the taps, then shifted sums and SiLU by torch.compile
  short_conv         causal_conv1d, FLA's Triton version, with SiLU

Times come from CUDA events around batches of calls, after warming up (autotuning included).
With Triton before 3.7.1 FLA refuses its gated backward on Hopper, whose gradients come out wrong;
the check is lifted here, for the time alone, and the note of those rows says so.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

GRAPH_STEPS = 20
WRONG = "gradients are wrong with this Triton on Hopper: timing only"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def milliseconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median time of a call, by events around batches of about 0.1 s."""

    def batch(calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / calls

    batch(1), batch(1)
    calls = max(1, min(20, round(100 / batch(1))))
    return statistics.median(batch(calls) for _ in range(repeats))


def with_gradients(forward: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> Callable:
    """The forward pass, and with it the gradients of all inputs for a random output gradient."""
    do = torch.randn_like(forward(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, do)


def gates(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = -F.softplus(normal(*shape, dtype=torch.float32) - 2)
    return g, torch.sigmoid(normal(*shape))


def rule(sizes: dict[str, int], backward: bool) -> float:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    b, t, h, k, v = (sizes[x] for x in "BTHKV")
    inputs = [F.silu(normal(b, t, h, k)), F.silu(normal(b, t, h, k)), normal(b, t, h, v)]
    inputs += gates(b, t, h)

    def forward(q, k, v, g, beta):
        return chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]

    if backward:
        return milliseconds(with_gradients(forward, inputs))
    with torch.no_grad():
        return milliseconds(lambda: forward(*inputs))


def step(sizes: dict[str, int], state_dtype: str) -> float:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    b, h, k, v = (sizes[x] for x in "BHKV")
    inputs = [F.silu(normal(b, 1, h, k)), F.silu(normal(b, 1, h, k)), normal(b, 1, h, v)]
    g, beta = gates(b, 1, h)
    first = normal(b, h, k, v, dtype=getattr(torch, state_dtype))

    def steps(count: int) -> torch.Tensor:
        state = first
        for _ in range(count):
            _, state = fused_recurrent_gated_delta_rule(
                *inputs,
                g=g,
                beta=beta,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        return state

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            steps(3)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            steps(GRAPH_STEPS)
        return milliseconds(graph.replay) / GRAPH_STEPS


def conv(sizes: dict[str, int], backward: bool) -> float:
    b, t, d, r, w = (sizes[x] for x in "BTDRW")
    u, h, bias = normal(b, t, d), F.silu(normal(b, t, r)), normal(w, d)
    w2 = (normal(w * d, r, dtype=torch.float32) * r**-0.5).to(torch.bfloat16)

    @torch.compile(dynamic=False)
    def shifted_sums(u, taps, bias):
        taps, padded = taps.view(b, t, w, d), F.pad(u, (0, 0, w - 1, 0))
        total = sum(padded[:, j : j + t] * (taps[:, :, j] + bias[j]) for j in range(w))
        return F.silu(total)

    def forward(u, h, w2, bias):
        return shifted_sums(u, F.linear(h, w2), bias)

    if backward:
        return milliseconds(with_gradients(forward, [u, h, w2, bias]))
    with torch.no_grad():
        return milliseconds(lambda: forward(u, h, w2, bias))


def static_conv(sizes: dict[str, int], backward: bool) -> float:
    from fla.modules.causal_conv1d import causal_conv1d

    b, t, d, w = (sizes[x] for x in "BTDW")
    inputs = [normal(b, t, d), normal(d, w)]

    def forward(u, weight):
        return causal_conv1d(u, weight, activation="silu", backend="triton")[0]

    if backward:
        return milliseconds(with_gradients(forward, inputs))
    with torch.no_grad():
        return milliseconds(lambda: forward(*inputs))


def allow_hopper() -> bool:
    """Lifts FLA's refusal where it applies; returns whether it did."""
    triton = tuple(int(x) for x in importlib.metadata.version("triton").split(".")[:3])
    hopper = torch.cuda.get_device_capability()[0] == 9
    if not hopper or triton >= (3, 7, 1):
        return False
    import fla.ops.common.chunk_o as chunk_o

    chunk_o.IS_NVIDIA_HOPPER = False
    return True


def measure(row: dict[str, Any], lifted: bool) -> dict[str, Any]:
    """One row's time, or why there is none."""
    backward = "backward" in row["what"]
    try:
        if row["op"] == "gated_delta_rule":
            ms = rule(row["sizes"], backward)
            return {"ms": ms, "note": WRONG if backward and lifted else None}
        if row["op"] == "gated_delta_step":
            return {"ms": step(row["sizes"], row["what"].split()[0]), "note": None}
        if row["op"] == "short_conv":
            return {"ms": static_conv(row["sizes"], backward), "note": None}
        return {"ms": conv(row["sizes"], backward), "note": None}
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "note": "out of memory"}
    except Exception as error:  # a peer that cannot run a row is a line of the table, not its end
        return {"ms": None, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        torch.cuda.empty_cache()


def main() -> None:
    # Else transformers would take kernels.py beside this file for the package that it looks for.
    here = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != here]
    torch.manual_seed(0)
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    lifted = allow_hopper()
    packages = ("torch", "triton", "flash-linear-attention")
    versions = {name: importlib.metadata.version(name) for name in packages}
    device = torch.cuda.get_device_name()
    results = {}
    for row in rows:
        results[row["name"]] = measure(row, lifted)
        print(row["name"], results[row["name"]], file=sys.stderr, flush=True)
        report = {"device": device, "versions": versions, "rows": results}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
