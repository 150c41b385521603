"""The gated delta rule's walk in Triton proper, beside the Pallas kernel that the package ships.

    python benchmarks/triton_walk.py [--batch B] [--length T] [--heads H] [--key K] [--value V]
    python benchmarks/triton_walk.py --lower      (compiles to PTX, needs no GPU, runs nothing)

Needs the extra `triton` and a Hopper GPU (a CUDA plugin of JAX for --lower); else says so in one
line. Each kind of walk is checked against the Pallas kernel's result, then both are timed.

    E = V − f (K S)     N = T E     O = h (Q S) + Y E     S <- γ_C S + Kᵀ (w N)

(kernels_pallas/gated_delta_rule/kernel_math.py has the notation.) As in the Pallas kernel, one
program takes 64 columns of V of one value head through all chunks and holds Sᵀ [v, K] in registers.
What differs is how blocks arrive: one thread asks the copy engine (TMA) for a block of k, q, v, T
or Y, which lands in shared memory two chunks ahead. A stage takes 48 KB, so one program runs on a
multiprocessor. Descriptors are made by each program in memory that the launcher lends it; K = 96
is a block of 64 columns and one of 32. Read and written is what walk.py reads and writes.

Measured on one H100 80GB, B 8, T 8192, H 12, K 96, V 256, bfloat16, milliseconds:

    launched by XLA, the kernel below, compiled ahead by jax-triton 0.4.1 and Triton 3.7.1
        output 0.635, states 0.747, final 0.344, homogeneous 0.209
        (Triton 3.9.0: output 0.615; with descriptors made by the host 0.604)
    the Pallas kernel of that day in the same process: output 1.008, states 0.845
    launched from PyTorch, Triton 3.6.0, output alone
        pointers as Pallas makes them, 2 / 3 stages                 0.944 / 1.165
        the same, v as it lies an operand of a product              0.733 / 0.628
        TMA, 2 / 3 / 4 stages                                       0.690 / 0.582 / 0.577
        Gluon, TMA, 168 registers: three programs a multiprocessor  0.485

Errors to the Pallas kernel: o 3.1e-3 (that one still took P' N for Y E), N 8.6e-7, last state and
states none; the homogeneous walk was timed and not checked. With pointers, Triton 3.6 takes a v
that no product reads as it lies through registers, not through the pipeline's shared memory: most
of what TMA gains there. The Pallas kernel at 2 stages gains 9 % (0.912) when v is made an operand,
21 % (0.796) when h and γ of the next chunk are read ahead as well.

Triton 3.9 writes PTX 9.4 unless told otherwise; the ptxas of CUDA 13.0 reads up to 9.0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh  # noqa: E402

from kernels_pallas.gated_delta_rule.blocks import CHUNK, find_blocks  # noqa: E402
from kernels_pallas.gated_delta_rule.gates import gate_rows  # noqa: E402
from kernels_pallas.gated_delta_rule.kernel_math import Scores  # noqa: E402
from kernels_pallas.gated_delta_rule.scores import scores  # noqa: E402
from kernels_pallas.gated_delta_rule.walk import Walked  # noqa: E402
from kernels_pallas.gated_delta_rule.walk import walk as pallas_walk  # noqa: E402

try:
    import jax_triton
    import triton
    import triton.language as tl
except ImportError:
    jax_triton = None

KINDS = ("output", "states", "final", "homogeneous")
KEY_WIDTHS = {64: (64, 0), 96: (64, 32), 128: (128, 0)}  # columns of the one or two blocks of K
PTX_VERSION = 87  # for a ptxas older than Triton's own
TOLERANCE = 1e-2  # relative; both kernels round the same operands to bfloat16
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def _walk(
    q, k, v, t, y, f, h, w, g, first, last, o, news, states,
    T,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BV: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, KIND: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """KIND: index in KINDS. H value heads, G of them a key head. K is K0 + K1 columns."""
    column, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    one = (batch * H + head).to(tl.int64)
    begin = batch.to(tl.int64) * T
    at_k = (head // G) * K
    at_v = head * V + column * BV
    count = T // C
    KS: tl.constexpr = K * (H // G)
    VS: tl.constexpr = V * H

    kd0 = tl.make_tensor_descriptor(k + begin * KS, [T, KS], [KS, 1], [C, K0])
    td = tl.make_tensor_descriptor(t + one * T * C, [T, C], [C, 1], [C, C])
    if K1:
        kd1 = tl.make_tensor_descriptor(k + begin * KS, [T, KS], [KS, 1], [C, K1])
    if KIND != 3:
        vd = tl.make_tensor_descriptor(v + begin * VS, [T, VS], [VS, 1], [C, BV])
    if KIND == 0:
        qd0 = tl.make_tensor_descriptor(q + begin * KS, [T, KS], [KS, 1], [C, K0])
        if K1:
            qd1 = tl.make_tensor_descriptor(q + begin * KS, [T, KS], [KS, 1], [C, K1])
        yd = tl.make_tensor_descriptor(y + one * T * C, [T, C], [C, 1], [C, C])
        od = tl.make_tensor_descriptor(o + begin * VS, [T, VS], [VS, 1], [C, BV])
    if KIND == 1:
        nd = tl.make_tensor_descriptor(news + begin * VS, [T, VS], [VS, 1], [C, BV])
        kept = states + one * count * V * K
        sd0 = tl.make_tensor_descriptor(kept, [count * V, K], [K, 1], [BV, K0])
        if K1:
            sd1 = tl.make_tensor_descriptor(kept, [count * V, K], [K, 1], [BV, K1])

    c = tl.arange(0, C)
    state = ((one * V + column * BV) + tl.arange(0, BV))[:, None] * K
    columns0 = tl.arange(0, K0)[None, :]
    s0 = tl.load(first + state + columns0)
    if K1:
        columns1 = K0 + tl.arange(0, K1)[None, :]
        s1 = tl.load(first + state + columns1)

    for i in tl.range(0, count, num_stages=STAGES):
        row = one * T + i * C
        k0 = kd0.load([i * C, at_k])
        if K1:
            k1 = kd1.load([i * C, at_k + K0])
        if KIND != 3:
            vb = vd.load([i * C, at_v])
        tb = td.load([i * C, 0])
        fr, wr, gamma = tl.load(f + row + c), tl.load(w + row + c), tl.load(g + row + C - 1)

        x0 = s0.to(tl.bfloat16)
        read = tl.dot(x0, tl.trans(k0))
        if K1:
            x1 = s1.to(tl.bfloat16)
            read = tl.dot(x1, tl.trans(k1), read)
        error = -read * fr[None, :]
        if KIND != 3:
            error += tl.trans(vb).to(tl.float32)
        error = error.to(tl.bfloat16)
        n = tl.dot(error, tl.trans(tb))
        if KIND == 0:
            q0 = qd0.load([i * C, at_k])
            ob = tl.dot(x0, tl.trans(q0))
            if K1:
                q1 = qd1.load([i * C, at_k + K0])
                ob = tl.dot(x1, tl.trans(q1), ob)
            yb, hr = yd.load([i * C, 0]), tl.load(h + row + c)
            ob = tl.dot(error, tl.trans(yb), ob * hr[None, :])
            od.store([i * C, at_v], tl.trans(ob.to(tl.bfloat16)))
        if KIND == 1:
            nd.store([i * C, at_v], tl.trans(n.to(tl.bfloat16)))
            sd0.store([i * V + column * BV, 0], x0)
            if K1:
                sd1.store([i * V + column * BV, K0], x1)
        written = (n * wr[None, :]).to(tl.bfloat16)
        s0 = tl.dot(written, k0, s0 * gamma)
        if K1:
            s1 = tl.dot(written, k1, s1 * gamma)

    tl.store(last + state + columns0, s0)
    if K1:
        tl.store(last + state + columns1, s1)


def triton_walk(
    kind: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scores: Scores,
    from_start: jax.Array,
    initial: jax.Array,
    *,
    columns: int = 64,
    warps: int = 4,
    stages: int = 3,
) -> Walked:
    """Takes the place of kernels_pallas.gated_delta_rule.walk.walk on a Hopper GPU, for bfloat16.

    Args:
      kind: one of `KINDS`.
      q: queries [B, T, H, K] bfloat16, T a multiple of 64.
      k: keys, likewise.
      v: values [B, T, HV, V] bfloat16.
      scores: of all chunks.
      from_start: γ [B, HV, N, C] float32.
      initial: transposed state before the first chunk [B, HV, V, K] float32.
      columns: columns of V a program takes.
      warps: warps a program.
      stages: depth of the pipeline.

    Returns:
      What `kind` asks for.
    """
    batch, heads, count, _ = from_start.shape
    width, key_width = initial.shape[2:]
    first, second = KEY_WIDTHS[key_width]
    # An output that the kind does not ask for is one value that nobody writes.
    rows = jax.ShapeDtypeStruct((batch, count * CHUNK, heads, width), k.dtype)
    kept = jax.ShapeDtypeStruct((batch, heads, count, width, key_width), k.dtype)
    none = jax.ShapeDtypeStruct((1,), k.dtype)
    last, o, news, states = jax_triton.triton_call(
        q, k, v, *scores, from_start, initial,
        kernel=triton.jit(_walk),
        out_type=[
            jax.ShapeDtypeStruct(initial.shape, jnp.float32),
            rows if kind == "output" else none,
            rows if kind == "states" else none,
            kept if kind == "states" else none,
        ],
        grid=(width // columns, heads, batch),
        name=f"gated_delta_walk_{kind}_triton",
        num_warps=warps,
        num_stages=stages,
        backend_options={"ptx_version": PTX_VERSION},
        T=count * CHUNK, H=heads, G=heads // k.shape[2], K=key_width, V=width, C=CHUNK,
        BV=columns, K0=first, K1=second, KIND=KINDS.index(kind), STAGES=stages,
    )  # fmt: skip
    walked = Walked(last)
    if kind == "output":
        walked = walked._replace(o=o)
    if kind == "states":
        walked = walked._replace(news=news, states=states)
    return walked


def inputs(batch: int, length: int, heads: int, key_width: int, width: int) -> tuple[Any, ...]:
    """Makes the walk's inputs from random queries, keys, values and gates."""
    keys = jax.random.split(jax.random.key(0), 6)
    q, k = (
        jax.nn.silu(jax.random.normal(x, (batch, length, heads, key_width))).astype(jnp.bfloat16)
        for x in keys[:2]
    )
    v = jax.random.normal(keys[2], (batch, length, heads, width)).astype(jnp.bfloat16)
    decay = -(jax.random.uniform(keys[3], (batch, length, heads)) ** 3)
    gates = gate_rows(decay, jax.random.uniform(keys[4], (batch, length, heads)), CHUNK)
    blocks = find_blocks("gpu", key_width)
    chunks = scores(q, k, gates, blocks=blocks, scale=key_width**-0.5, use_qk_l2norm=True)
    initial = 0.1 * jax.random.normal(keys[5], (batch, heads, width, key_width))
    return q, k, v, chunks, gates.from_start, initial


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
    return jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())


def lower(kind: str, batch: int, length: int, heads: int, key_width: int, width: int) -> str:
    """Compiles a walk to PTX for an H100 without one, and returns the module around it."""
    rows, matrix = (batch, length, heads), (batch, heads, length, CHUNK)
    factor = jax.ShapeDtypeStruct((batch, heads, length // CHUNK, CHUNK), jnp.float32)
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    arrays = (
        half(*rows, key_width),
        half(*rows, key_width),
        half(*rows, width),
        Scores(half(*matrix), half(*matrix), factor, factor, factor),
        factor,
        jax.ShapeDtypeStruct((batch, heads, width, key_width), jnp.float32),
    )
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=H100)):
        traced = jax.jit(lambda *a: triton_walk(kind, *a)).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def obstacle(lowering: bool) -> str | None:
    """Says what keeps the script from running here, or None."""
    if jax_triton is None:
        return "jax-triton is not installed: pip install 'jet-jax[triton]'"
    if lowering:
        return None
    device = jax.devices()[0]
    if device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) < 9.0:
        return f"TMA needs a Hopper GPU; this is {device.device_kind}"
    return None


def main(arguments: list[str] | None = None) -> None:
    """Checks and times the walks, or compiles them alone."""
    parser = argparse.ArgumentParser(description="Triton walk beside the Pallas walk")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--key", type=int, default=96, choices=KEY_WIDTHS)
    parser.add_argument("--value", type=int, default=256)
    parser.add_argument("--lower", action="store_true", help="compile to PTX without a GPU")
    options = parser.parse_args(arguments)
    if options.length % CHUNK or options.value % 64:
        parser.error(f"--length must be a multiple of {CHUNK} and --value of 64")
    if (reason := obstacle(options.lower)) is not None:
        print(f"triton_walk: skipped: {reason}")
        return
    shape = options.batch, options.length, options.heads, options.key, options.value
    if options.lower:
        for kind in KINDS:
            print(f"{kind:12s} lowered, {len(lower(kind, *shape))} characters")
        return
    arrays = jax.jit(inputs, static_argnums=range(5))(*shape)
    blocks = find_blocks("gpu", options.key)
    for kind in KINDS:
        old = jax.jit(lambda *a, kind=kind: pallas_walk(kind, *a, blocks=blocks))
        new = jax.jit(lambda *a, kind=kind: triton_walk(kind, *a))
        errors = [
            float(x) for x in jax.tree.leaves(jax.tree.map(error, new(*arrays), old(*arrays)))
        ]
        if not max(errors) < TOLERANCE:
            sys.exit(f"{kind}: relative errors {errors} to the Pallas walk")
        times = milliseconds(old, arrays), milliseconds(new, arrays)
        print(
            f"{kind:12s} Pallas {times[0]:.3f} ms, Triton {times[1]:.3f}, error {max(errors):.1e}"
        )


if __name__ == "__main__":
    main()
