"""Options of the mixers whose state corrects itself: DeltaNet, Gated DeltaNet and KDA.

Names and defaults are those of the published layers (flash-linear-attention 0.6.0).
"""

from __future__ import annotations

from dataclasses import dataclass

from jet_jax.option_checks import Number, require, require_one_of, require_positive, whole
from jet_jax.recurrent_options import (
    RecurrentOptions,
    check_conv,
    check_eps,
    conv_params,
    conv_tails,
)


class DeltaOptions(RecurrentOptions):
    """What the mixers with a delta rule have in common."""

    STATE_PRODUCTS = 3  # to predict, to write and to read


@dataclass(frozen=True)
class DeltaNetOptions(DeltaOptions):
    """DeltaNet (arXiv 2406.06484): the delta rule without decay.

    The key width of a head is hidden_size·expand_k / num_heads, the value width
    hidden_size·expand_v / num_heads. `allow_neg_eigval` doubles the writing strength
    (arXiv 2411.12537).
    """

    num_heads: int = 4
    expand_k: Number = 1.0
    expand_v: Number = 1.0
    use_beta: bool = True
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    conv_bias: bool = False
    allow_neg_eigval: bool = False
    qk_activation: str = "silu"
    qk_norm: str = "l2"
    norm_eps: Number = 1e-5

    def __post_init__(self) -> None:
        check_eps(self)
        require_positive("num_heads", self.num_heads)
        require_one_of("qk_activation", self.qk_activation, ("silu", "relu", "elu", "identity"))
        require_one_of("qk_norm", self.qk_norm, ("l2", "sum"))
        check_conv(self)

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, key width and value width of the recurrent state."""
        out = [self.num_heads]
        for name in ("expand_k", "expand_v"):
            factor = getattr(self, name)
            way_out = f"hidden_size={hidden_size} or {name}={factor}"
            width = whole(f"hidden_size * {name}", hidden_size * factor, way_out)
            require(
                width % self.num_heads == 0,
                f"hidden_size * {name} = {width} is not divisible by num_heads={self.num_heads}",
            )
            out.append(width // self.num_heads)
        return out[0], out[1], out[2]

    def widths(self, hidden_size: int) -> tuple[int, int]:
        """Widths of the key (and query) rows and of the value rows."""
        heads, key, value = self.state_shape(hidden_size)
        return heads * key, heads * value

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """The raw rows that the convolutions look back on."""
        key, value = self.widths(hidden_size)
        return conv_tails(self, q=key, k=key, v=value)

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        key, value = self.widths(hidden_size)
        per_input = 2 * key + value * (2 + self.use_gate) + self.num_heads * self.use_beta
        return hidden_size * per_input

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """The output norm and the convolutions."""
        key, value = self.widths(hidden_size)
        return self.state_shape(hidden_size)[2] + conv_params(self, key, key, value)


@dataclass(frozen=True)
class GroupedValueOptions(DeltaOptions):
    """Sizes of the mixers whose value heads may be a multiple of their key heads.

    `head_dim` is the key width K, K·expand_v the value width; value head j uses query and key head
    j // (num_v_heads / num_heads). None value heads are as many as the others.
    """

    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    expand_v: Number = 2.0
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    conv_bias: bool = False
    norm_eps: Number = 1e-5

    def __post_init__(self) -> None:
        check_eps(self)
        for name in ("head_dim", "num_heads", "value_heads"):
            require_positive(name.replace("value", "num_v"), getattr(self, name))
        require(
            self.value_heads % self.num_heads == 0,
            f"num_v_heads={self.num_v_heads} is not a multiple of num_heads={self.num_heads}; "
            "query and key heads are shared evenly among the value heads",
        )
        self.state_shape(0)
        check_conv(self)

    @property
    def value_heads(self) -> int:
        """Heads HV of values, gates and state."""
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Value heads, key width and value width of the recurrent state."""
        way_out = f"head_dim={self.head_dim} or expand_v={self.expand_v}"
        value = whole("head_dim * expand_v", self.head_dim * self.expand_v, way_out)
        return self.value_heads, self.head_dim, value

    def widths(self) -> tuple[int, int]:
        """Widths of the key (and query) rows and of the value rows."""
        heads, key, value = self.state_shape(0)
        return self.num_heads * key, heads * value

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """The raw rows that the convolutions look back on."""
        key, value = self.widths()
        return conv_tails(self, q=key, k=key, v=value)


@dataclass(frozen=True)
class GDNOptions(GroupedValueOptions):
    """Gated DeltaNet (arXiv 2412.06464): the delta rule with a decay a head.

    `allow_neg_eigval` doubles the writing strength (arXiv 2411.12537).
    """

    use_gate: bool = True
    output_gate_activation: str = "swish"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("swish", "silu", "sigmoid")
        require_one_of("output_gate_activation", self.output_gate_activation, known)

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        key, value = self.widths()
        return hidden_size * (2 * key + value * (2 + self.use_gate) + 2 * self.value_heads)

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """A_log, dt_bias, the output norm and the convolutions."""
        heads, _, value = self.state_shape(hidden_size)
        key_row, value_row = self.widths()
        return 2 * heads + value + conv_params(self, key_row, key_row, value_row)


@dataclass(frozen=True)
class KDAOptions(GroupedValueOptions):
    """Kimi delta attention (arXiv 2510.26692): the delta rule with a decay for each key channel.

    With `safe_gate` log decays lie between `lower_bound` and 0.
    """

    head_dim: int = 128
    num_heads: int = 16
    expand_v: Number = 1.0
    safe_gate: bool = False
    lower_bound: Number | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.safe_gate or self.lower_bound is not None,
            "safe_gate=True needs lower_bound, the lowest log decay (-5 is usual)",
        )
        require(
            self.lower_bound is None or self.lower_bound < 0,
            f"lower_bound={self.lower_bound} bounds log decays and must be negative",
        )

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        key, value = self.widths()
        heads, k, v = self.state_shape(hidden_size)
        low_rank = v * (2 * hidden_size + heads * k + value)  # of the decay and the output gate
        return hidden_size * (2 * key + 2 * value + heads) + low_rank

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """A_log, dt_bias, the gate's bias, the output norm and the convolutions."""
        key, value = self.widths()
        heads, k, v = self.state_shape(hidden_size)
        return heads + heads * k + value + v + conv_params(self, key, key, value)
