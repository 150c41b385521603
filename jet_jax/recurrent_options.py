"""The base of the options of mixers that keep a matrix a head, and what several of them share."""

from __future__ import annotations

import math
from typing import Any

from jet_jax.option_checks import MixerOptions, require, require_positive


class RecurrentOptions(MixerOptions):
    """Counts that follow from the shapes of a mixer's state and weights.

    A subclass gives `state_shape`, `tails`, `matmul_params` and `vector_params`.
    """

    # Multiply-adds a token for each of the state's elements: one to write, one to read.
    STATE_PRODUCTS = 2

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, key width and value width of the recurrent state."""
        raise NotImplementedError

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """What the mixer keeps of the last tokens' rows: name → (rows, width)."""
        raise NotImplementedError

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies; `first`: in the first layer of its kind."""
        raise NotImplementedError

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """All other weights: biases, norms, gates' vectors and the taps of convolutions."""
        raise NotImplementedError

    def check(self, hidden_size: int) -> None:
        """Raises ValueError if heads and widths do not divide."""
        self.state_shape(hidden_size)

    def param_count(self, hidden_size: int, first: bool = False) -> int:
        """Parameters of one mixer."""
        return self.matmul_params(hidden_size, first) + self.vector_params(hidden_size, first)

    def cache_bytes(
        self, context: int, dtype_bytes: int, state_bytes: int, hidden_size: int
    ) -> int:
        """Bytes of the state and of the last tokens' rows, whatever the context."""
        kept = sum(rows * width for rows, width in self.tails(hidden_size).values())
        return math.prod(self.state_shape(hidden_size)) * state_bytes + kept * dtype_bytes

    def mixing_flops(self, context: int, hidden_size: int) -> float:
        """Forward FLOPs a token of the recurrence and the convolutions."""
        state = math.prod(self.state_shape(hidden_size))
        taps = sum((rows + 1) * width for rows, width in self.tails(hidden_size).values())
        return float(2 * self.STATE_PRODUCTS * state + 2 * taps)


def conv_tails(options: Any, **widths: int) -> dict[str, tuple[int, int]]:
    """The rows that the short convolutions keep, none without them."""
    if not options.use_short_conv:
        return {}
    return {name: (options.conv_size - 1, width) for name, width in widths.items()}


def conv_params(options: Any, *widths: int) -> int:
    """Taps and biases of the short convolutions over rows of these widths."""
    return sum(widths) * (options.conv_size + options.conv_bias) * options.use_short_conv


def check_conv(options: Any) -> None:
    """Raises ValueError for a convolution of fewer than two taps."""
    require_positive("conv_size", options.conv_size)
    require(options.conv_size >= 2, f"conv_size={options.conv_size} must be at least 2")


def check_eps(options: Any) -> None:
    """Makes `norm_eps` a float; raises ValueError unless it is positive."""
    object.__setattr__(options, "norm_eps", float(options.norm_eps))
    require(options.norm_eps > 0, f"norm_eps={options.norm_eps} must be positive")
