"""PyTorch peer of one block of `jet-jax bench blocks`: flash-linear-attention's layer of its sizes.

    python benchmarks/peer_fla_blocks.py BLOCK.json     (as benchmarks/blocks.py does)

Needs an NVIDIA GPU, torch, flash-linear-attention 0.6.0 (with fla-core), einops and transformers.
BLOCK.json holds {"name", "width", "options", "shared", "sizes"} of a `jet_jax.bench.blocks.Block`,
whose options are named as that package's; `sizes` is a list of {"B", "T"}. Each line of the output
is a JSON object: first {"start": ...} with device and versions, then a result each, forward and
forward plus the gradients of the input and all parameters, in bfloat16 (A_log, dt_bias and D in
float32), without autocast.

Mamba2's layer calls mamba_ssm where that is installed (causal_conv1d too, else its own Triton
convolution). Without it the layer falls back to plain PyTorch, which wants 150 GB for a scan of
32,768 tokens; then the scan is done by the package's own `chunk_simple_gla`, and the note says so.
The package's autotuner chooses among all its configurations, which are compiled beforehand in
threads and timed for 25 ms each. It may still take minutes a layer: give it time.
With Triton before 3.7.1 the package refuses some gated gradients on Hopper, which come out wrong;
the check is lifted, for the time alone, and the note says that too.
"""

from __future__ import annotations

import concurrent.futures
import importlib.metadata
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peer_fla import WRONG, allow_hopper, milliseconds

# Else transformers would take kernels.py beside this file for the package that it looks for.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

LAYERS = {
    "retnet": "MultiScaleRetention",
    "gla": "GatedLinearAttention",
    "mamba2": "Mamba2",
    "deltanet": "DeltaNet",
    "gdn": "GatedDeltaNet",
    "kda": "KimiDeltaAttention",
    "rwkv7": "RWKV7Attention",
}
PLACES = {"rwkv7": {"layer_idx": 1, "num_hidden_layers": 2}}  # not the first: it has no v_lora
GATED = ("gdn", "mamba2")  # whose gradients pass through what is refused on Hopper
FLOAT32 = ("A_log", "dt_bias", "D")
WITHOUT_MAMBA_SSM = "mamba_ssm is not installed: scan by chunk_simple_gla"
Forward = Callable[..., torch.Tensor]


def tune_faster() -> None:
    """Has Triton's autotuner compile its configurations in threads, and time each more briefly."""
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    run = Autotuner.run

    def compile_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        named = {name: x for name, x in given.items() if name in self.arg_names}
        key = [named[name] for name in self.keys if name in named]
        key = (*key, *(str(x.dtype) for x in named.values() if hasattr(x, "dtype")))
        if len(self.configs) > 1 and key not in self.cache:  # what `run` asks, too
            self.nargs = dict(zip(self.arg_names, args, strict=False))
            rest = {name: x for name, x in kwargs.items() if name not in ("grid", "warmup")}

            def compile_one(config: Any) -> None:
                options = {**rest, **config.all_kwargs()}
                self.fn.warmup(*args, grid=(1,), **options)

            first, *others = self.prune_configs(kwargs)
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                # One that cannot be compiled is the autotuner's to report.
                concurrent.futures.wait([pool.submit(compile_one, first)])
                concurrent.futures.wait([pool.submit(compile_one, x) for x in others])
        return run(self, *args, **kwargs)

    Autotuner.run = compile_first
    Autotuner.do_bench = lambda self, call, quantiles: do_bench(
        call, warmup=5, rep=25, quantiles=quantiles
    )


def make_layer(name: str, width: int, options: dict[str, Any]) -> torch.nn.Module:
    """The package's layer in bfloat16, matrices that start at zero filled as ours are."""
    import fla.layers

    layer_class = getattr(fla.layers, LAYERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = layer_class(hidden_size=width, **options, **PLACES.get(name, {}))
    layer = layer.to("cuda", torch.bfloat16).train()
    for path, weight in layer.named_parameters():
        if path in FLOAT32:
            weight.data = weight.data.float()
        elif weight.ndim >= 2 and not weight.any():
            weight.data.normal_(0, 0.02)
    return layer


def forward_of(layer: torch.nn.Module, shared: dict[str, torch.Tensor]) -> Forward:
    """The layer as a function of its input alone."""
    return lambda x: layer(hidden_states=x, **shared)[0]


def mamba2_by_simple_gla(layer: torch.nn.Module) -> Forward:
    """Mamba2 with the layer's weights, its scan by the package's kernels for a decay a head."""
    from fla.modules.convolution import causal_conv1d
    from fla.ops.simple_gla import chunk_simple_gla

    inner, states, heads = layer.intermediate_size, layer.ssm_state_size, layer.num_heads
    taps, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias

    def forward(x: torch.Tensor) -> torch.Tensor:
        z, rows, dt = layer.in_proj(x).split([inner, inner + 2 * states, heads], dim=-1)
        rows = causal_conv1d(x=rows.contiguous(), weight=taps, bias=bias, activation="silu")[0]
        u, k, q = rows.split([inner, states, states], dim=-1)
        q, k = (y[:, :, None].expand(-1, -1, heads, -1) for y in (q, k))
        u = u.unflatten(-1, (heads, -1))
        dt = F.softplus(dt.float() + layer.dt_bias)
        v = (u * dt[..., None]).to(x.dtype)
        o = chunk_simple_gla(q=q, k=k, v=v, g=-layer.A_log.exp() * dt, scale=1.0)[0]
        o = (o + layer.D[:, None] * u).to(x.dtype)
        return layer.out_proj(layer.norm(o.flatten(2), z).to(x.dtype))

    return forward


def time_both(
    forward: Forward, inputs: list[torch.Tensor], weights: list[torch.Tensor], backward: bool
) -> float:
    """Milliseconds of the forward pass, or of it and the gradients of inputs and weights."""
    x = inputs[0]
    if not backward:
        with torch.no_grad():
            return milliseconds(lambda: forward(x))
    dy = torch.randn_like(x)
    leaves = [*inputs, *weights]
    return milliseconds(lambda: torch.autograd.grad(forward(x), leaves, dy, allow_unused=True))


def measure(block: dict[str, Any], sizes: dict[str, int], backward: bool, lifted: bool) -> Any:
    """One result: "ms", or None and a "note" about why."""
    name, width = block["name"], block["width"]
    note = WRONG if backward and lifted and name in GATED else None
    try:
        rows = sizes["B"], sizes["T"]

        def normal(width: int) -> torch.Tensor:
            return torch.randn(*rows, width, device="cuda", dtype=torch.bfloat16).requires_grad_()

        layer = make_layer(name, width, block["options"])
        x, shared = normal(width), {k: normal(w) for k, w in block["shared"].items()}
        if name == "mamba2" and importlib.util.find_spec("mamba_ssm") is None:
            forward = mamba2_by_simple_gla(layer)
            note = "; ".join(filter(None, (WITHOUT_MAMBA_SSM, note)))
        else:
            forward = forward_of(layer, shared)
        ms = time_both(forward, [x, *shared.values()], list(layer.parameters()), backward)
        return {"ms": ms, "note": note}
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "note": "out of memory"}
    except Exception as error:  # a peer that cannot run a size is a line of the table, not its end
        return {"ms": None, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    finally:
        torch.cuda.empty_cache()


def main() -> None:
    torch.manual_seed(0)
    block = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    packages = ("torch", "triton", "flash-linear-attention")
    versions = {name: importlib.metadata.version(name) for name in packages}
    start = {"device": torch.cuda.get_device_name(), "versions": versions}
    print(json.dumps({"start": start}), flush=True)
    lifted = allow_hopper()
    tune_faster()
    for sizes in block["sizes"]:
        for backward in (False, True):
            name = f"{block['name']}-b{sizes['B']}-t{sizes['T']}" + "-grad" * backward
            found = measure(block, sizes, backward, lifted)
            rate = 1e3 * sizes["B"] * sizes["T"] / found["ms"] if found["ms"] else None
            result = {"name": name, "op": "layer", "sizes": sizes, "tokens_s": rate, **found}
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
