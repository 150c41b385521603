"""What is timed of a block: its layer over a sequence, and its recurrence for one token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

import kernels_pallas
from jet_jax.bench.blocks import LOW_RANK, SMALL, Block
from jet_jax.bench.rows import BOTH, FORWARD, STEPS, Function, Row
from jet_jax.mixers.context import Context
from kernels_pallas.dispatch import preferring

SIZES = ((8, 4096), (1, 65536))  # B and T of the layer: equal-sized batches of short and long rows
STEP_BATCH = 128
STEP_OPS: dict[str, Callable[..., Any]] = {
    "linear_attention": kernels_pallas.linear_attention_step,
    "gated_delta_rule": kernels_pallas.gated_delta_step,
    "kda": kernels_pallas.kda_step,
    "dplr_delta_rule": kernels_pallas.dplr_delta_rule_step,
}


@dataclasses.dataclass(frozen=True)
class Layer(Row):
    """One layer's mixer in bfloat16, forward or with the gradients of input and parameters.

    Attributes:
      block: which.
      backward: with gradients, as in training; no remat.
      weights: whether the parameters' gradients are asked for.
    """

    block: Block
    backward: bool = False
    weights: bool = True
    op = "layer"

    @property
    def what(self) -> str:
        return f"{self.block.name}, {BOTH if self.backward else FORWARD}"

    @property
    def input_key(self) -> tuple[str, ...]:
        return self.op, self.block.name, str(self.sizes)

    @property
    def tokens(self) -> int:
        """Tokens of a call."""
        return self.sizes["B"] * self.sizes["T"]

    def num_bytes(self) -> int:
        """Bytes of inputs, outputs and weights; backward also of their gradients."""
        rows, weights = 2 * self.tokens * self.block.width, 2 * self.block.param_count
        # x w; y | x w y's gradient; the gradients of x and w.
        return 2 * rows + weights + self.backward * (3 * rows + 2 * weights)

    def flops(self) -> int:
        """Of the products with weights and the chunked recurrence; three times with gradients."""
        products = self.block.projection_products() + self.block.recurrence_products()
        return 2 * products * self.tokens * (3 if self.backward else 1)

    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """The weights' leaves, the input, what other layers share, and the output's gradient.

        The last is there without `backward` too, so that one program makes both rows' inputs.
        """
        weights, rows = jax.random.split(key)
        # One draw for all rows: each more would take a quarter of a second to compile.
        widths = [self.block.width, *self.block.shared.values(), self.block.width]
        shape = (self.sizes["B"], self.sizes["T"], sum(widths))
        drawn = jax.random.normal(rows, shape).astype(jnp.bfloat16)
        ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        return *jax.tree.leaves(self.block.weights(weights)), *jnp.split(drawn, ends, axis=-1)

    def function(self, implementation: str) -> Function:
        """The layer with one implementation of its operations; "reference" is all in float32."""
        dtype = "float32" if implementation == "reference" else "bfloat16"
        structure = self.block.structure(dtype)
        shapes = jax.eval_shape(self.block.weights, jax.random.key(0))
        count = len(jax.tree.leaves(shapes))

        def forward(leaves, x, *shared):
            params = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
            context = Context(
                positions=jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]),
                shared=dict(zip(self.block.shared, shared, strict=True)),
            )
            return nnx.merge(structure, params)(x, context)[0]

        def both(leaves, rows, dy):
            if self.weights:
                y, pull = jax.vjp(forward, leaves, *rows)
            else:
                y, pull = jax.vjp(lambda *rows: forward(leaves, *rows), *rows)
            return y, *pull(dy)

        def run(*args):
            leaves, rows, dy = args[:count], args[count:-1], args[-1]
            with preferring(implementation):
                return both(leaves, rows, dy) if self.backward else forward(leaves, *rows)

        return run

    def small(self) -> Layer:
        """One short row with the input's gradient, in forward rows too: one program checks both.

        The weights' gradients are left out: some are sums that cancel.
        """
        sizes = {"B": 1, "T": min(self.sizes["T"], 512)}
        return dataclasses.replace(self, sizes=sizes, backward=True, weights=False)


@dataclasses.dataclass(frozen=True)
class Token(Row):
    """The recurrence of a block for one token of B sequences, on a float32 state."""

    block: Block
    op = "decoding step"
    steps = STEPS
    donated = (0,)

    @property
    def what(self) -> str:
        return self.block.name

    def num_bytes(self) -> int:
        """The state read and written, and the token's rows."""
        return self.sizes["B"] * self.block.step_bytes()

    def flops(self) -> int:
        return 0  # none that matrix units do

    def inputs(self, key: jax.Array) -> tuple[jax.Array, ...]:
        """The state and the token's inputs in the order of `Block.token`."""
        batch = self.sizes["B"]
        keys = iter(jax.random.split(key, 8))
        state = jax.random.normal(next(keys), (batch, *self.block.state_shape))
        token = {
            name: _draw(name, next(keys), (batch, *shape), dtype)
            for name, (shape, dtype) in self.block.token().items()
        }
        if self.block.form is LOW_RANK:  # what is removed: along one direction, a part of it
            length = jnp.linalg.norm(token["a"].astype(jnp.float32), axis=-1, keepdims=True)
            token["a"] = -(token["a"] / length).astype(token["a"].dtype)
            token["b"] = -token["a"] * jax.nn.sigmoid(token["b"])
        return state, *token.values()

    def function(self, implementation: str) -> Function:
        """`steps` steps; the outputs, and last the state."""
        op, block = STEP_OPS[self.block.form.op], self.block
        options = block.op_options() | {"implementation": implementation}

        @jax.jit  # traced and lowered once, though called many times
        def step(state, *token):
            return op(**dict(zip(block.token(), token, strict=True)), state=state, **options)

        def run(state, *token):
            outputs = []
            for _ in range(self.steps):
                o, state = step(state, *token)
                if implementation != "pallas":  # else XLA fuses steps, which decoding cannot
                    state = jax.lax.optimization_barrier(state)
                outputs.append(o)
            return *outputs, state  # every o, else XLA would leave out what is not used

        return run

    def small(self) -> Token:
        return OneToken(self.name, {"B": min(self.sizes["B"], 8)}, self.block)


class OneToken(Token):
    """One step a call: errors of many steps on one token would say little."""

    steps = 1


def _draw(name: str, key: jax.Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Log decays about -0.15, writing strengths about 0.5, and normal rows."""
    x = jax.random.normal(key, shape)
    if name == "g":
        return -jax.nn.softplus(x - 2)
    if name == "beta":
        return jax.nn.sigmoid(x)
    return x.astype(dtype)


def layer_rows(block: Block, small: bool, quick: bool) -> list[Layer]:
    """Forward and with gradients, at both sizes or, short, at one on a CPU.

    Args:
      block: which.
      small: sizes for a CPU.
      quick: with gradients only, the first size only.
    """
    rows = []
    for batch, length in SIZES[:1] if quick or small else SIZES:
        sizes = {"B": 2, "T": length // SMALL**2} if small else {"B": batch, "T": length}
        name = f"{block.name}-b{sizes['B']}-t{sizes['T']}"
        rows += [] if quick else [Layer(name, sizes, block)]
        rows.append(Layer(f"{name}-grad", sizes, block, backward=True))
    return rows


def step_row(block: Block, small: bool) -> Token:
    """The decoding step at B128, at B8 on a CPU."""
    batch = 8 if small else STEP_BATCH
    return Token(f"{block.name}-step-b{batch}", {"B": batch}, block)
