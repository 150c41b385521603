"""What `jet-jax bench kernels` runs: operations at sizes, with the work they cannot avoid.

`num_bytes` counts every input and output of a call once (backward: inputs and incoming gradients
read, gradients written), `flops` the products of the chunked form with 64 tokens a chunk, without
the triangular inverse, for which there is no one count.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dynamic_conv, gated_delta_rule, gated_delta_step, short_conv

CHUNK = 64
STEPS = 20  # decoding steps of one timed program; a loop would add launches of its own
FORWARD, BOTH = "forward", "forward + backward"
Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Row(abc.ABC):
    """One line of the table.

    Attributes:
      name: what it is called on the command line.
      sizes: by dimension name.
      op: the operation.
      steps: calls of the operation in one call of `function`.
      donated: positions of the inputs whose memory `function` may use; the last output has the
        new value.
    """

    name: str
    sizes: dict[str, int]
    op: ClassVar[str]
    steps: ClassVar[int] = 1
    donated: ClassVar[tuple[int, ...]] = ()

    @property
    @abc.abstractmethod
    def what(self) -> str:
        """What is done with the operation."""

    @property
    def input_key(self) -> tuple[str, ...]:
        """Equal for rows with equal `inputs`, which are then compiled once."""
        return self.op, self.what, str(self.sizes)

    @abc.abstractmethod
    def num_bytes(self) -> int:
        """Bytes that a call has to move."""

    @abc.abstractmethod
    def flops(self) -> int:
        """Multiplications and additions of a call's products."""

    @abc.abstractmethod
    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """Random inputs."""

    @abc.abstractmethod
    def function(self, implementation: str) -> Function:
        """The function of the inputs that is timed."""

    @abc.abstractmethod
    def small(self) -> Row:
        """The same with few heads and tokens, which the reference can check."""


def _normal(key: jax.Array, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _gates(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Log decays about -0.15 and writing strengths about 0.5, float32."""
    keys = jax.random.split(key)
    g = -jax.nn.softplus(jax.random.normal(keys[0], shape) - 2)
    return g, jax.nn.sigmoid(jax.random.normal(keys[1], shape))


@dataclasses.dataclass(frozen=True)
class Rule(Row):
    """`gated_delta_rule` on bfloat16 inputs, q and k normalised inside, no initial state."""

    backward: bool = False
    op = "gated_delta_rule"

    @property
    def what(self) -> str:
        return BOTH if self.backward else FORWARD

    def num_bytes(self) -> int:
        b, t, h, k, v = (self.sizes[x] for x in "BTHKV")
        one = 2 * (2 * k + 2 * v) + 2 * 4  # q k v o; g beta
        if self.backward:
            one += 2 * (4 * k + 3 * v) + 4 * 4  # q k dq dk v do dv; g beta dg dbeta
        return b * t * h * one

    def flops(self) -> int:
        b, t, h, k, v = (self.sizes[x] for x in "BTHKV")
        one = 6 * k * v + 4 * CHUNK * v + 4 * CHUNK * k
        if self.backward:
            one += 14 * k * v + 10 * CHUNK * v + 12 * CHUNK * k
        return b * t * h * one

    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        b, t, h, k, v = (self.sizes[x] for x in "BTHKV")
        keys = jax.random.split(key, 5)
        q, key_ = (jax.nn.silu(_normal(x, b, t, h, k)) for x in keys[:2])
        do = (_normal(keys[3], b, t, h, v),) if self.backward else ()
        return q, key_, _normal(keys[2], b, t, h, v), *_gates(keys[4], (b, t, h)), *do

    def function(self, implementation: str) -> Function:
        def forward(q, k, v, g, beta):
            o, _ = gated_delta_rule(
                q, k, v, g, beta, use_qk_l2norm=True, implementation=implementation
            )
            return o

        return _with_gradients(forward) if self.backward else forward

    def small(self) -> Rule:
        sizes = self.sizes | {"B": 1, "H": min(self.sizes["H"], 2)}
        return dataclasses.replace(self, sizes=sizes | {"T": min(self.sizes["T"], 1000)})


@dataclasses.dataclass(frozen=True)
class Step(Row):
    """`gated_delta_step`: one token of B sequences on a float32 or bfloat16 state."""

    state_dtype: str = "float32"
    op = "gated_delta_step"
    steps = STEPS
    donated = (5,)

    @property
    def what(self) -> str:
        return f"{self.state_dtype} state"

    def num_bytes(self) -> int:
        b, h, k, v = (self.sizes[x] for x in "BHKV")
        state = 2 * k * v * np.dtype(jnp.dtype(self.state_dtype)).itemsize
        return b * h * (state + 2 * (2 * k + 2 * v) + 2 * 4)

    def flops(self) -> int:
        return 0  # none that matrix units do

    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        b, h, k, v = (self.sizes[x] for x in "BHKV")
        keys = jax.random.split(key, 5)
        q, key_ = (jax.nn.silu(_normal(x, b, h, k)) for x in keys[:2])
        state = _normal(keys[4], b, h, k, v, dtype=self.state_dtype)
        return q, key_, _normal(keys[2], b, h, v), *_gates(keys[3], (b, h)), state

    def function(self, implementation: str) -> Function:
        @jax.jit  # traced and lowered once, though called many times
        def step(*args):
            return gated_delta_step(*args, use_qk_l2norm=True, implementation=implementation)

        def run(q, k, v, g, beta, state):
            outputs = []
            for _ in range(self.steps):
                o, state = step(q, k, v, g, beta, state)
                outputs.append(o)
            return *outputs, state  # every o, else XLA would leave out what is not used

        return run

    def small(self) -> Step:
        return OneStep(self.name, self.sizes | {"B": min(self.sizes["B"], 8)}, self.state_dtype)


class OneStep(Step):
    """One step a call: errors of many steps on one token would say little."""

    steps = 1


@dataclasses.dataclass(frozen=True)
class Conv(Row):
    """`dynamic_conv` in bfloat16, the generator's second product included, no bias on the taps."""

    backward: bool = False
    op = "dynamic_conv"

    @property
    def what(self) -> str:
        return BOTH if self.backward else FORWARD

    def num_bytes(self) -> int:
        b, t, d, r, w = (self.sizes[x] for x in "BTDRW")
        weights, rows = (r + 1) * w * d, b * t * (2 * d + r)  # u h v
        if self.backward:
            weights, rows = 3 * weights, rows + b * t * (3 * d + 2 * r)  # u h dv du dh
        return 2 * (weights + rows)

    def flops(self) -> int:
        b, t, d, r, w = (self.sizes[x] for x in "BTDRW")
        products = 4 if self.backward else 1  # taps; taps again, dh, dw2
        return products * 2 * b * t * r * w * d

    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        b, t, d, r, w = (self.sizes[x] for x in "BTDRW")
        keys = jax.random.split(key, 5)
        h = jax.nn.silu(_normal(keys[1], b, t, r))
        w2 = _normal(keys[2], r, w, d, dtype=jnp.float32) * r**-0.5
        dv = (_normal(keys[4], b, t, d),) if self.backward else ()
        bias = _normal(keys[3], w, d)
        return _normal(keys[0], b, t, d), h, w2.astype(jnp.bfloat16), bias, *dv

    def function(self, implementation: str) -> Function:
        def forward(u, h, w2, b2):
            return dynamic_conv(u, h, w2, b2, implementation=implementation)[0]

        return _with_gradients(forward) if self.backward else forward

    def small(self) -> Conv:
        return dataclasses.replace(
            self, sizes=self.sizes | {"B": 1, "T": min(self.sizes["T"], 500)}
        )


@dataclasses.dataclass(frozen=True)
class ShortConv(Row):
    """`short_conv` in bfloat16, with SiLU."""

    backward: bool = False
    op = "short_conv"

    @property
    def what(self) -> str:
        return BOTH if self.backward else FORWARD

    def num_bytes(self) -> int:
        b, t, d = (self.sizes[x] for x in "BTD")
        return 2 * b * t * d * (5 if self.backward else 2)  # u v; u dv du

    def flops(self) -> int:
        return 0  # none that matrix units do

    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        b, t, d, w = (self.sizes[x] for x in "BTDW")
        keys = jax.random.split(key, 3)
        dv = (_normal(keys[2], b, t, d),) if self.backward else ()
        return _normal(keys[0], b, t, d), _normal(keys[1], w, d), *dv

    def function(self, implementation: str) -> Function:
        def forward(u, w):
            return short_conv(u, w, implementation=implementation)[0]

        return _with_gradients(forward) if self.backward else forward

    def small(self) -> ShortConv:
        return dataclasses.replace(
            self, sizes=self.sizes | {"B": 1, "T": min(self.sizes["T"], 500)}
        )


def _with_gradients(forward: Function) -> Function:
    """Adds the gradients of all inputs for a given gradient of the output, the last argument."""

    def both(*args):
        o, pull = jax.vjp(forward, *args[:-1])
        return o, *pull(args[-1])

    return both


JET_2B, JET_4B = {"H": 12, "K": 96, "V": 256}, {"H": 16, "K": 128, "V": 256}
CONV_2B, CONV_4B = {"D": 3072, "R": 384, "W": 4}, {"D": 4096, "R": 512, "W": 4}
LENGTHS = (8192, 32768, 65536, 131072, 262144)
QUICK = ("rule-2b", "rule-2b-grad", "step-float32-b128", "conv-2b", "conv-2b-grad")


def _sizes(b: int, t: int | None, heads: dict[str, int], small: bool) -> dict[str, int]:
    """Batch and length before the widths; small ones keep the widths of heads and taps."""
    if small:
        few = {"H": 2, "D": 128, "R": 32}
        heads = {x: min(size, few.get(x, size)) for x, size in heads.items()}
        b, t = min(b, 32), None if t is None else t // 64
    return {"B": b} | ({} if t is None else {"T": t}) | heads


def all_rows(small: bool) -> list[Row]:
    """Returns every row, at the sizes of Jet-Nemotron-2B and -4B or at small ones for a CPU."""
    total = LENGTHS[-1]
    rows: list[Row] = []
    for name, b, t, heads in (
        ("rule-2b", 8, 8192, JET_2B),
        ("rule-4b", 8, 8192, JET_4B),
        ("rule-64k", 1, 65536, JET_2B),
    ):
        sizes = _sizes(b, t, heads, small)
        rows += [Rule(name, sizes), Rule(f"{name}-grad", sizes, backward=True)]
    for backward, suffix in ((False, ""), (True, "-grad")):
        for t in LENGTHS:
            sizes = _sizes(total // t, t, JET_2B, small)
            rows.append(Rule(f"length-{t // 1024}k{suffix}", sizes, backward))
    for state_dtype in ("float32", "bfloat16"):
        for b in (1, 8, 32, 128):
            name = f"step-{state_dtype}-b{b}"
            rows.append(Step(name, _sizes(b, None, JET_2B, small), state_dtype))
    for name, widths in (("conv-2b", CONV_2B), ("conv-4b", CONV_4B)):
        sizes = _sizes(8, 8192, widths, small)
        rows += [Conv(name, sizes), Conv(f"{name}-grad", sizes, backward=True)]
    sizes = _sizes(8, 8192, {"D": CONV_2B["D"], "W": CONV_2B["W"]}, small)
    rows += [ShortConv("short-conv", sizes), ShortConv("short-conv-grad", sizes, backward=True)]
    return rows
