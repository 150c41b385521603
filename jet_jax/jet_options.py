"""Options of the JetBlock, and of the blocks between Gated DeltaNet and it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jet_jax.option_checks import require, require_positive
from jet_jax.recurrent_options import RecurrentOptions

LETTERS = {"query": "q", "key": "k", "value": "v"}  # in the names of weights and of kept rows


@dataclass(frozen=True)
class JetOptions(RecurrentOptions):
    """JetBlock: gated delta rule with a per-token generated short convolution on the values.

    `head_dim` is the key width K; the value width is K·expand_v. The defaults are the released
    block: Jet-Nemotron (arXiv 2508.15884) §3.2 and its released inference code. The others are the
    steps from Gated DeltaNet to it, of which the paper prints no numbers.

    Attributes:
      num_heads: heads H.
      head_dim: key width K of a head.
      expand_v: V / K.
      conv_size: taps W of each convolution, at least 2.
      generator_reduction: a generated convolution of F channels has a generator F / this wide.
      norm_eps: of the output norm.
      dynamic: which of "query", "key" and "value" pass a convolution with generated taps.
      static: which of them pass one with learned taps, as in Gated DeltaNet. Those in neither are
        projections with SiLU.
      freeze_generator: whether the generators' two matrices keep their random start, so that taps
        depend on the token but how they do is not learned. Both then start as every other matrix,
        N(0, initializer_range²): the usual start at 0 would freeze a static convolution.
        The taps' constant part still trains.
      use_gate: whether the output is gated; without, it is only normalised.
    """

    STATE_PRODUCTS = 3  # to predict, to write and to read

    num_heads: int
    head_dim: int
    expand_v: float = 2.0
    conv_size: int = 4
    generator_reduction: int = 8
    norm_eps: float = 1e-5
    dynamic: Sequence[str] = ("value",)
    static: Sequence[str] = ()
    freeze_generator: bool = False
    use_gate: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "norm_eps", float(self.norm_eps))
        for name in ("num_heads", "head_dim", "conv_size", "generator_reduction"):
            require_positive(name, getattr(self, name))
        require(self.conv_size >= 2, f"conv_size={self.conv_size} must be at least 2")
        for what, exact, rounded in (
            ("head_dim * expand_v", self.head_dim * self.expand_v, self.value_dim),
            ("num_heads * head_dim * expand_v", self.key_width * self.expand_v, self.value_width),
        ):
            require(
                rounded >= 1 and abs(exact - rounded) <= 1e-5 * exact,
                f"{what} = {exact} is not an integer; change head_dim={self.head_dim} or "
                f"expand_v={self.expand_v}",
            )
        for name in ("dynamic", "static"):
            object.__setattr__(self, name, _rows(name, getattr(self, name)))
        both = [row for row in self.dynamic if row in self.static]
        require(
            not both,
            f"{' and '.join(both)} cannot be in both dynamic={self.dynamic} and "
            f"static={self.static}; a row passes one convolution",
        )
        require(
            bool(self.dynamic) or not self.freeze_generator,
            "freeze_generator=True, but dynamic=() has no generator to freeze",
        )
        for row in self.dynamic:
            width = self.widths[LETTERS[row]]
            require(
                width % self.generator_reduction == 0,
                f"{row} width {width} is not divisible by "
                f"generator_reduction={self.generator_reduction}",
            )

    @property
    def value_dim(self) -> int:
        """Value width V of one head."""
        return int(self.head_dim * self.expand_v)

    @property
    def key_width(self) -> int:
        """H·K."""
        return self.num_heads * self.head_dim

    @property
    def value_width(self) -> int:
        """H·V."""
        return self.num_heads * self.value_dim

    @property
    def widths(self) -> dict[str, int]:
        """Widths of the rows q, k and v."""
        return {"q": self.key_width, "k": self.key_width, "v": self.value_width}

    @property
    def generators(self) -> dict[str, str]:
        """For each row with generated taps, "q", "k" or "v", the name of its generator's weights.

        A frozen one has another name, by which weight decay leaves it alone too.
        """
        names = {"query": "q_generator", "key": "k_generator", "value": "generator"}
        prefix = "frozen_" if self.freeze_generator else ""
        return {LETTERS[row]: prefix + names[row] for row in self.dynamic}

    @property
    def short_convs(self) -> dict[str, str]:
        """For each row with learned taps, "q", "k" or "v", the name of its convolution's."""
        return {LETTERS[row]: f"{LETTERS[row]}_conv1d" for row in self.static}

    def generator_width(self, row: str) -> int:
        """Hidden width R of the generator of row "q", "k" or "v"."""
        return self.widths[row] // self.generator_reduction

    def state_shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Heads, key width and value width of the recurrent state."""
        return self.num_heads, self.head_dim, self.value_dim

    def tails(self, hidden_size: int) -> dict[str, tuple[int, int]]:
        """The raw rows that the convolutions look back on."""
        convolved = [*self.generators, *self.short_convs]
        return {r: (self.conv_size - 1, w) for r, w in self.widths.items() if r in convolved}

    def matmul_params(self, hidden_size: int, first: bool = False) -> int:
        """Weights that every token multiplies."""
        values = (2 + self.use_gate) * self.value_width
        out = hidden_size * (2 * self.key_width + values + 2 * self.num_heads)
        for row in self.generators:
            taps = self.conv_size * self.widths[row]
            out += self.generator_width(row) * (hidden_size + taps)
        return out

    def vector_params(self, hidden_size: int, first: bool = False) -> int:
        """A_log, dt_bias, the output norm and the convolutions' own taps."""
        channels = sum(width for _, width in self.tails(hidden_size).values())
        return 2 * self.num_heads + self.value_dim + self.conv_size * channels


def _rows(name: str, given: Sequence[str]) -> tuple[str, ...]:
    """Which rows a setting names, in the order q, k, v. Raises ValueError for an unknown one."""
    require(not isinstance(given, str), f"{name}={given!r} must be a tuple of names")
    unknown = set(given) - LETTERS.keys()
    known = ", ".join(map(repr, LETTERS))
    require(not unknown, f"{name}={tuple(given)} names {sorted(unknown)}; known are {known}")
    return tuple(row for row in LETTERS if row in given)
