"""The linear-attention blocks at the sizes of the search, and what a token costs in each.

Every block has a state of 294,912 elements a layer at width 1,536, as in the paper's comparison of
blocks (arXiv 2508.15884, table 1), so that none is faster for remembering less.

Costs are counted for the chunked form with `CHUNK` tokens a chunk. With K keys, V values and C
tokens a chunk, a token and head cost

    scores·C·K + mixes·C·V + passes·K·V    multiply-adds, forward

where `scores` counts the products of a chunk's keys with each other and with its queries, `mixes`
the products of C x C matrices with values, and `passes` the reads and writes of the state.
Triangular inverses are left out, for which there is no one count.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jet_jax.config import ModelConfig
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Place
from jet_jax.params import split
from jet_jax.step import cast_params

CHUNK = 64
WIDTH, SMALL = 1536, 8  # the model's width; a CPU gets every width divided by SMALL
# Training throughput of whole models, arXiv 2508.15884, table 1 (unit not printed there).
PAPER = {
    "retnet": 269,
    "mamba2": 273,
    "gla": 265,
    "deltanet": 254,
    "gdn": 247,
    "jet": 233,
    "rwkv7": 123,
}
BASE = "gdn"  # whose speed is 1
QUICK = ("gla", "gdn", "jet")


@dataclasses.dataclass(frozen=True)
class Form:
    """How a recurrence corrects its state, and what a chunk of it computes.

    Attributes:
      name: of the recurrence.
      op: the operation in `kernels_pallas`.
      scores: products of keys with keys or queries within a chunk.
      mixes: products of C x C matrices with values.
      passes: products with the state.
    """

    name: str
    op: str
    scores: int
    mixes: int
    passes: int

    def products(self, heads: int, key: int, value: int, chunk: int = CHUNK) -> int:
        """Multiply-adds a token of the chunked recurrence, forward."""
        scores, mixes = self.scores * chunk * key, self.mixes * chunk * value
        return heads * (scores + mixes + self.passes * key * value)


LINEAR = Form("linear attention", "linear_attention", 1, 1, 2)
DELTA = Form("delta rule", "gated_delta_rule", 2, 2, 3)
KEY_DELTA = Form("delta rule, a decay a key channel", "kda", 2, 2, 3)
LOW_RANK = Form("diagonal plus low rank", "dplr_delta_rule", 4, 4, 4)


@dataclasses.dataclass(frozen=True)
class Block:
    """One linear-attention layer of a model.

    Attributes:
      name: its layer type.
      form: its recurrence.
      decay: "head" or "channel" for one decay a head or a key channel, None for none.
      options: of the mixer, by name; the published code's layer takes the same names.
      width: the model's width D.
      scale: on the queries; None leaves the operation's default.
      shared: width by name of what earlier layers hand on to it, [B, T, width].
    """

    name: str
    form: Form
    decay: str | None
    options: dict[str, Any]
    width: int
    scale: float | None = None
    shared: dict[str, int] = dataclasses.field(default_factory=dict)

    def config(self, dtype: str = "bfloat16") -> ModelConfig:
        """A model of two such layers, the least in which one is not the first."""
        return ModelConfig(
            vocab_size=256,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            layer_types=(self.name, self.name),
            mixers={self.name: self.options},
            dtype=dtype,
        )

    def mixer(self, key: jax.Array, dtype: str = "bfloat16") -> nnx.Module:
        """The second layer's mixer as a model starts with it, float32 parameters.

        Args:
          key: of the random parameters.
          dtype: compute dtype.
        """
        config = self.config(dtype)
        place = Place(index=1, first=False)
        options = config.options(self.name)
        return MIXERS[self.name](config, options, rngs=nnx.Rngs(key), place=place)

    def structure(self, dtype: str = "bfloat16") -> Any:
        """The mixer's static description, for `nnx.merge` with `weights`."""
        return split(nnx.eval_shape(lambda: self.mixer(jax.random.key(0), dtype)))[0]

    def weights(self, key: jax.Array) -> dict[Any, Any]:
        """Random weights as a nested dict: bfloat16, but for those that always are float32.

        Matrices that start at zero get other numbers: products with zeros take less power, and
        would flatter the time of a trained model.
        """
        _, params = split(self.mixer(key))
        return jax.tree.map(_without_zeros, cast_params(params, jnp.bfloat16))

    @property
    def mixer_options(self) -> Any:
        """The options as the mixer takes them."""
        return self.config().options(self.name)

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Value heads, key width K and value width V."""
        return self.mixer_options.state_shape(self.width)

    @property
    def state_elements(self) -> int:
        """Numbers that the recurrent state of one sequence holds."""
        return math.prod(self.state_shape)

    @property
    def key_heads(self) -> int:
        """Heads of queries and keys."""
        return getattr(self.mixer_options, "n_groups", self.state_shape[0])

    @property
    def param_count(self) -> int:
        """Parameters of the layer's mixer."""
        return self.mixer_options.param_count(self.width)

    def token(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Inputs of the recurrence for one token: name → (shape, dtype)."""
        heads, key, value = self.state_shape
        row = ((self.key_heads, key), "bfloat16")
        out: dict[str, Any] = {"q": row, "k": row, "v": ((heads, value), "bfloat16")}
        if self.form is LOW_RANK:
            out |= {"a": row, "b": row}
        if self.decay is not None:
            out["g"] = ((heads,) if self.decay == "head" else (heads, key), "float32")
        if self.form in (DELTA, KEY_DELTA):
            out["beta"] = ((heads,), "float32")
        return out

    def op_options(self) -> dict[str, Any]:
        """What the mixer passes to the operation beside the inputs of `token`."""
        out: dict[str, Any] = {} if self.scale is None else {"scale": self.scale}
        if self.decay is None:
            out["g"] = None
        if self.form in (DELTA, KEY_DELTA):
            out["use_qk_l2norm"] = True
        return out

    def token_bytes(self) -> int:
        """Bytes a token that the recurrence reads and writes, forward, its state aside."""
        heads, _, value = self.state_shape
        read = sum(math.prod(shape) * jnp.dtype(x).itemsize for shape, x in self.token().values())
        return read + 2 * heads * value

    def step_bytes(self) -> int:
        """Bytes of one decoding step a sequence, the float32 state read and written."""
        return self.token_bytes() + 2 * 4 * self.state_elements

    def projection_products(self) -> int:
        """Multiply-adds a token of the products with weights."""
        return self.mixer_options.matmul_params(self.width)

    def recurrence_products(self) -> int:
        """Multiply-adds a token of the chunked recurrence, forward."""
        return self.form.products(*self.state_shape)

    def facts(self) -> dict[str, Any]:
        """All of the above as JSON-safe values."""
        heads, key, value = self.state_shape
        return {
            "name": self.name,
            "op": self.form.op,
            "options": self.options,
            "state": {"K": key, "V": value, "H": heads},
            "state_elements": self.state_elements,
            "parameters": self.param_count,
            "projection_products": self.projection_products(),
            "recurrence_products": self.recurrence_products(),
            "token_bytes": self.token_bytes(),
            "step_bytes": self.step_bytes(),
            "paper_ratio": PAPER[self.name] / PAPER[BASE] if self.name in PAPER else None,
        }


def _without_zeros(x: jax.Array) -> jax.Array:
    """Replaces a matrix that is zero throughout by numbers of size 0.02."""
    if x.ndim < 2:
        return x
    other = 0.02 * jnp.sin(jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape))
    return jnp.where(jnp.any(x != 0), x, other.astype(x.dtype))


def all_blocks(small: bool = False) -> list[Block]:
    """Returns every block at the sizes of the search, or with widths divided by 8 for a CPU."""
    part = SMALL if small else 1
    width = WIDTH // part
    by_width = {"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0}
    return [
        Block("retnet", LINEAR, "head", by_width, width),
        Block("gla", LINEAR, "channel", by_width, width),
        Block(
            "mamba2",
            LINEAR,
            "head",
            {"state_size": 96 // part, "head_dim": 64 // part, "expand": 2},
            width,
            scale=1.0,
        ),
        Block("deltanet", DELTA, None, by_width, width),
        Block(
            "gdn", DELTA, "head", {"num_heads": 4, "head_dim": 192 // part, "expand_v": 2.0}, width
        ),
        Block(
            "jet",
            DELTA,
            "head",
            {"num_heads": 12, "head_dim": 96 // part, "expand_v": 8 / 3},
            width,
        ),
        Block(
            "kda",
            KEY_DELTA,
            "channel",
            {"num_heads": 18, "head_dim": 128 // part, "expand_v": 1.0},
            width,
        ),
        Block(
            "rwkv7",
            LOW_RANK,
            "channel",
            {"head_dim": 192 // part, "fuse_norm": True},  # as its models have it
            width,
            shared={"v_first": width},
        ),
    ]


def choose(blocks: Sequence[Block], patterns: Sequence[str], quick: bool) -> list[Block]:
    """Picks blocks by name.

    Args:
      blocks: all of them.
      patterns: names, or shell patterns such as "g*"; none picks all, or the quick ones.
      quick: without patterns, pick a handful.

    Raises:
      ValueError: a pattern fits no name.
    """
    names = [block.name for block in blocks]
    patterns = list(patterns) or (list(QUICK) if quick else ["*"])
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"no block is called {pattern!r}; there are {', '.join(names)}")
    return [b for b in blocks if any(fnmatch.fnmatch(b.name, p) for p in patterns)]
