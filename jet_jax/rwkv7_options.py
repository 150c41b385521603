"""Options of RWKV-7's time mixing, with the names and defaults of flash-linear-attention 0.6.0."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jet_jax.delta_options import DeltaOptions
from jet_jax.option_checks import Number, require, require_positive
from jet_jax.recurrent_options import check_eps


@dataclass(frozen=True)
class RWKV7Options(DeltaOptions):
    """The time mixing of RWKV-7 (arXiv 2503.14456).

    Heads of key width `head_dim`, hidden_size / head_dim of them (or `num_heads`, with head_dim
    None); the value width is value_dim / heads, value_dim being hidden_size unless given. The
    `*_low_rank_dim` are the bottlenecks of decay, in-context learning rate (a), value residual (v)
    and gate; None follows the published rule. `fuse_norm` says how the removal key is normalised:
    k / sqrt(|k|² + 1e-6) if True, k / max(|k|, 1e-12) if False. The output norm's epsilon is
    head_dim·norm_eps.
    """

    STATE_PRODUCTS = 4  # one more to remove along another key than it writes along

    head_dim: int | None = 64
    num_heads: int | None = None
    value_dim: int | None = None
    decay_low_rank_dim: int | None = None
    gate_low_rank_dim: int | None = None
    a_low_rank_dim: int | None = None
    v_low_rank_dim: int | None = None
    norm_eps: Number = 1e-5
    fuse_norm: bool = False

    def __post_init__(self) -> None:
        check_eps(self)
        require(
            self.head_dim is not None or self.num_heads is not None,
            "rwkv7 needs head_dim or num_heads",
        )
        for name in ("head_dim", "num_heads", "value_dim", *(f"{x}_low_rank_dim" for x in RANKS)):
            if getattr(self, name) is not None:
                require_positive(name, getattr(self, name))

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, key width and value width of the recurrent state."""
        name, size = ("head_dim", self.head_dim)
        if size is None:
            name, size = "num_heads", self.num_heads
        assert size is not None
        require(
            hidden_size % size == 0, f"hidden_size={hidden_size} is not divisible by {name}={size}"
        )
        key, heads = size, hidden_size // size
        if name == "num_heads":
            key, heads = heads, key
        require(
            self.num_heads in (None, heads),
            f"num_heads={self.num_heads}, but hidden_size / head_dim = {heads}; leave one out",
        )
        values = self.value_width(hidden_size)
        require(
            values % heads == 0,
            f"value_dim={values} is not divisible by the {heads} heads",
        )
        return heads, key, values // heads

    def value_width(self, hidden_size: int) -> int:
        """H·V."""
        return hidden_size if self.value_dim is None else self.value_dim

    def rank(self, which: str, hidden_size: int) -> int:
        """The bottleneck of one low-rank projection: "decay", "a", "v" or "gate"."""
        given = getattr(self, f"{which}_low_rank_dim")
        if given is not None:
            return given
        # Longer keys get wider bottlenecks, but for the gate; a multiple of 32 in every case.
        size = 1.0 if which == "gate" else self.state_shape(hidden_size)[1] / 64
        return max(32, 32 * round(RANKS[which] * math.sqrt(hidden_size) * size / 32))

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """The last token's input, for the token shift."""
        return {"shift": (1, hidden_size)}

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies; the first layer has no value residual."""
        values = self.value_width(hidden_size)
        projections = 2 * hidden_size * (hidden_size + values)
        outputs = {"decay": hidden_size, "a": hidden_size, "gate": values, "v": values}
        if first:
            del outputs["v"]
        return projections + sum(
            self.rank(which, hidden_size) * (hidden_size + out) for which, out in outputs.items()
        )

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """The six shifts, k_k, k_a, r_k, biases of decay, a and v, and the output norm."""
        values = self.value_width(hidden_size)
        return (6 + 3 + 2) * hidden_size + values * (not first) + 2 * values


# Bottlenecks of the published rule, in units of the square root of hidden_size.
RANKS = {"decay": 2.5, "a": 2.5, "v": 1.7, "gate": 5.0}
