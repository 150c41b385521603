"""Options of the mixers without a delta rule: RetNet, GLA and Mamba2.

Names and defaults are those of the published layers (flash-linear-attention 0.6.0).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jet_jax.option_checks import Number, require, require_one_of, require_positive, whole
from jet_jax.recurrent_options import (
    RecurrentOptions,
    check_conv,
    check_eps,
    conv_params,
    conv_tails,
)

GATES = ("swish", "silu", "sigmoid", "relu", "gelu")


@dataclass(frozen=True)
class RetNetOptions(RecurrentOptions):
    """Multi-scale retention (arXiv 2307.08621): a fixed decay a head, rotary positions.

    The key width of a head is hidden_size·expand_k / num_heads, the value width
    hidden_size·expand_v / num_heads. With `num_kv_heads` fewer key/value heads serve several query
    heads each. `fuse_norm` changes no number: it says under which name the published code stores
    the output norm (`g_norm_swish_gate` where norm and swish gate are fused, else `g_norm`).
    """

    num_heads: int = 8
    num_kv_heads: int | None = None
    expand_k: Number = 1.0
    expand_v: Number = 2.0
    use_short_conv: bool = False
    conv_size: int = 4
    conv_bias: bool = False
    use_output_gate: bool = True
    gate_fn: str = "swish"
    norm_eps: Number = 1e-5
    fuse_norm: bool = True

    def __post_init__(self) -> None:
        check_eps(self)
        require_positive("num_heads", self.num_heads)
        if self.num_kv_heads is not None:
            require_positive("num_kv_heads", self.num_kv_heads)
        require(
            self.num_heads % self.kv_heads == 0,
            f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}; "
            "query heads are shared evenly among the key/value heads",
        )
        require_one_of("gate_fn", self.gate_fn, GATES)
        check_conv(self)

    @property
    def kv_heads(self) -> int:
        """Heads of the keys and values as projected."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def head_widths(self, hidden_size: int) -> tuple[int, int]:
        """Key width K and value width V of one head."""
        out = []
        for name in ("expand_k", "expand_v"):
            factor = getattr(self, name)
            way_out = f"hidden_size={hidden_size} or {name}={factor}"
            width = whole(f"hidden_size * {name}", hidden_size * factor, way_out)
            require(
                width % self.num_heads == 0,
                f"hidden_size * {name} = {width} is not divisible by num_heads={self.num_heads}",
            )
            out.append(width // self.num_heads)
        return out[0], out[1]

    def check(self, hidden_size: int) -> None:
        """Raises ValueError if heads do not divide or cannot be rotated."""
        key, _ = self.head_widths(hidden_size)
        require(
            key % 2 == 0,
            f"retnet: a head's key width hidden_size * expand_k / num_heads = {key} is odd; rotary "
            "embedding pairs the two halves of a head",
        )

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, key width and value width of the recurrent state."""
        return (self.num_heads, *self.head_widths(hidden_size))

    def widths(self, hidden_size: int) -> tuple[int, int, int, int]:
        """Widths of the rows q, k, v and of the output before its projection."""
        key, value = self.head_widths(hidden_size)
        kv = self.kv_heads
        return self.num_heads * key, kv * key, kv * value, self.num_heads * value

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """The raw rows that the convolutions look back on."""
        q, k, v, _ = self.widths(hidden_size)
        return conv_tails(self, q=q, k=k, v=v)

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        q, k, v, out = self.widths(hidden_size)
        return hidden_size * (q + k + v + out * (1 + self.use_output_gate))

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """The output norm and the convolutions."""
        q, k, v, _ = self.widths(hidden_size)
        return self.head_widths(hidden_size)[1] + conv_params(self, q, k, v)


@dataclass(frozen=True)
class GLAOptions(RetNetOptions):
    """Gated linear attention (arXiv 2312.06635): a decay for each key channel, from the token.

    Widths and heads as in `RetNetOptions`. The log decay is
    log_sigmoid(gate) / gate_logit_normalizer, not below `clamp_min` where one is set; the gate
    passes a bottleneck of `gate_low_rank_dim`.
    """

    num_heads: int = 4
    expand_k: Number = 0.5
    expand_v: Number = 1.0
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: Number = 16
    clamp_min: Number | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("gate_low_rank_dim", self.gate_low_rank_dim)
        require(
            self.gate_logit_normalizer > 0,
            f"gate_logit_normalizer={self.gate_logit_normalizer} must be positive",
        )
        require(
            self.clamp_min is None or self.clamp_min <= 0,
            f"clamp_min={self.clamp_min} bounds log decays, which are at most 0",
        )

    def check(self, hidden_size: int) -> None:
        """Raises ValueError if heads do not divide."""
        self.head_widths(hidden_size)

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        keys = self.widths(hidden_size)[1]
        gate = self.gate_low_rank_dim * (hidden_size + keys)
        return super().matmul_params(hidden_size) + gate

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """The output norm, the gate's bias and the convolutions."""
        return super().vector_params(hidden_size) + self.widths(hidden_size)[1]


@dataclass(frozen=True)
class Mamba2Options(RecurrentOptions):
    """Mamba2 (arXiv 2405.21060): a scalar decay and step size a head, shared B and C.

    `expand`·hidden_size channels in heads of `head_dim` (the state's value width); `state_size` is
    the key width. Heads g·H/n_groups … share group g of B and C, as in mamba_ssm, and the output
    norm is taken over each group's channels. `num_heads` may be given and is checked. `dt_limit`
    bounds the step size; None is no bound.
    """

    head_dim: int = 64
    num_heads: int | None = None
    state_size: int = 128
    expand: Number = 2
    n_groups: int = 1
    conv_kernel: int = 4
    use_conv_bias: bool = True
    A_init_range: Any = (1.0, 16.0)
    D_has_hdim: bool = False
    rmsnorm: bool = True
    norm_before_gate: bool = False
    dt_limit: Any = (0.0, None)
    use_bias: bool = False
    norm_eps: Number = 1e-5

    def __post_init__(self) -> None:
        check_eps(self)
        for name in ("head_dim", "state_size", "n_groups", "conv_kernel"):
            require_positive(name, getattr(self, name))
        require(self.conv_kernel >= 2, f"conv_kernel={self.conv_kernel} must be at least 2")
        for name in ("A_init_range", "dt_limit"):
            pair = getattr(self, name)
            require(
                isinstance(pair, tuple | list) and len(pair) == 2,
                f"{name}={pair!r} must be a pair (lowest, highest)",
            )
            # JSON has neither tuples nor infinity.
            pair = tuple(None if x is None or math.isinf(x) else float(x) for x in pair)
            object.__setattr__(self, name, pair)
        low, high = self.dt_limit
        require(
            low is not None and low >= 0 and (high is None or high >= low),
            f"dt_limit={self.dt_limit} must be (lowest, highest) with 0 <= lowest <= highest",
        )
        low, high = self.A_init_range
        require(
            low is not None and high is not None and 0 < low <= high,
            f"A_init_range={self.A_init_range} must be (lowest, highest), both positive",
        )

    def inner(self, hidden_size: int) -> int:
        """Channels I = expand·hidden_size."""
        way_out = f"hidden_size={hidden_size} or expand={self.expand}"
        return whole("expand * hidden_size", self.expand * hidden_size, way_out)

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, state size N and head width P."""
        inner = self.inner(hidden_size)
        require(
            inner % self.head_dim == 0,
            f"expand * hidden_size = {inner} is not divisible by head_dim={self.head_dim}",
        )
        heads = inner // self.head_dim
        require(
            self.num_heads in (None, heads),
            f"num_heads={self.num_heads}, but expand * hidden_size / head_dim = {heads}; leave "
            "num_heads out",
        )
        require(
            heads % self.n_groups == 0,
            f"the {heads} heads are not divisible by n_groups={self.n_groups}",
        )
        return heads, self.state_size, self.head_dim

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """The raw rows that the convolution looks back on: of the channels, and of B and C."""
        rows = self.conv_kernel - 1
        return {
            "x": (rows, self.inner(hidden_size)),
            "bc": (rows, 2 * self.n_groups * self.state_size),
        }

    def projected(self, hidden_size: int) -> tuple[int, int, int, int]:
        """Widths of the parts of the input projection: z, x, B with C, and the step sizes."""
        inner, heads = self.inner(hidden_size), self.state_shape(hidden_size)[0]
        return inner, inner, 2 * self.n_groups * self.state_size, heads

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        return hidden_size * (sum(self.projected(hidden_size)) + self.inner(hidden_size))

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """A_log, dt_bias, D, the norm, biases and the convolution."""
        z, x, bc, heads = self.projected(hidden_size)
        conv = (x + bc) * (self.conv_kernel + self.use_conv_bias)
        biases = (z + x + bc + heads + hidden_size) * self.use_bias
        skip = x if self.D_has_hdim else heads
        return 2 * heads + skip + x * self.rmsnorm + conv + biases
