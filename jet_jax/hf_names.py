"""The one table of weight names and layouts between this project and Hugging Face.

A row gives our dotted path, the Hugging Face name and how the array is laid out there. `#` stands
for a layer number, `*` for one or more name parts; the first row that matches a path counts. The
table is read in both directions: which weights a model has follows from its config, so the
inverse is over that finite set.

Sources: transformers' Qwen2, Qwen3, Llama and Gemma 3 modules; the Jet-Nemotron repository.
"""

import enum
import re

import numpy as np

from jet_jax.config import ModelConfig
from jet_jax.placing import weight_specs
from jet_jax.safetensors_files import TensorSpec


class Layout(enum.Enum):
    """How the Hugging Face array is laid out, against ours.

    SAME: equal. TRANSPOSED: [out, in] for our [in, out]. TAPS: [VD·W, R], row c·W + j for channel
    c and tap j, for our [R, W, VD]. TAP_BIAS: [VD·W] for our [W, VD].
    """

    SAME = "same"
    TRANSPOSED = "transposed"
    TAPS = "taps"
    TAP_BIAS = "tap bias"

    def to_ours(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a view in our layout; `shape` is ours and says how many taps there are."""
        if self is Layout.TRANSPOSED:
            return array.T
        if self is Layout.TAPS:
            rank, taps, channels = shape
            return array.reshape(channels, taps, rank).transpose(2, 1, 0)
        if self is Layout.TAP_BIAS:
            taps, channels = shape
            return array.reshape(channels, taps).T
        return array

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Returns the array in the Hugging Face layout, a view where one exists."""
        if self is Layout.TRANSPOSED:
            return array.T
        if self is Layout.TAPS:
            return array.transpose(2, 1, 0).reshape(-1, array.shape[0])
        if self is Layout.TAP_BIAS:
            return array.T.reshape(-1)
        return array

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the Hugging Face shape of an array of our `shape`."""
        # A broadcast scalar of that shape takes no memory and knows what a layout does to it.
        return self.to_hf(np.broadcast_to(np.int8(0), shape)).shape


_GENERATOR = "model.layers.#.self_attn.dynamic_conv1d.kernel_generator"
TABLE: tuple[tuple[str, str, Layout], ...] = (
    ("embed_tokens.embedding", "model.embed_tokens.weight", Layout.SAME),
    ("norm.scale", "model.norm.weight", Layout.SAME),
    ("lm_head.kernel", "lm_head.weight", Layout.TRANSPOSED),
    ("layers.#.mlp.*.kernel", "model.layers.#.mlp.*.weight", Layout.TRANSPOSED),
    ("layers.#.mixer.generator.w1", f"{_GENERATOR}.w1.weight", Layout.TRANSPOSED),
    ("layers.#.mixer.generator.w2", f"{_GENERATOR}.w2.weight", Layout.TAPS),
    ("layers.#.mixer.generator.b2", f"{_GENERATOR}.w2.bias", Layout.TAP_BIAS),
    ("layers.#.mixer.*.kernel", "model.layers.#.self_attn.*.weight", Layout.TRANSPOSED),
    ("layers.#.mixer.*.scale", "model.layers.#.self_attn.*.weight", Layout.SAME),
    # Biases, A_log, dt_bias and other vectors keep their names.
    ("layers.#.mixer.*", "model.layers.#.self_attn.*", Layout.SAME),
    ("layers.#.*.scale", "model.layers.#.*.weight", Layout.SAME),  # the norms of a layer
)
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"

# Buffers that old checkpoints carry and that follow from the config.
KNOWN_BUFFERS = re.compile(r"(^|\.)rotary_emb(_local)?\.")


def hf_name(path: str) -> tuple[str, Layout]:
    """Translates a weight's dotted path.

    Args:
      path: for example `layers.3.mixer.q_proj.kernel`.

    Returns:
      The Hugging Face name and the layout there.

    Raises:
      ValueError: no row of the table matches.
    """
    for ours, theirs, layout in TABLE:
        pattern = re.escape(ours).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
        match = re.fullmatch(pattern, path)
        if match:
            parts = iter(match.groups())
            return re.sub(r"[#*]", lambda _: next(parts), theirs), layout  # noqa: B023
    raise ValueError(
        f"weight {path!r} has no Hugging Face name; add a row to TABLE in jet_jax/hf_names.py"
    )


def expected(config: ModelConfig) -> dict[str, tuple[str, Layout, tuple[int, ...]]]:
    """Lists the weights of a model under their Hugging Face names.

    Args:
      config: the model.

    Returns:
      Hugging Face name → (our dotted path, layout, our shape).
    """
    out = {}
    for path, spec in weight_specs(config).items():
        name, layout = hf_name(path)
        assert name not in out, f"{path} and {out[name][0]} are both {name}"
        out[name] = (path, layout, spec.shape)
    return out


def hf_specs(specs: dict[str, TensorSpec]) -> dict[str, tuple[str, Layout, TensorSpec]]:
    """Translates names and shapes of stored weights.

    Args:
      specs: shape and dtype by our dotted path.

    Returns:
      Hugging Face name → (our dotted path, layout, shape and dtype there).
    """
    out = {}
    for path, spec in specs.items():
        name, layout = hf_name(path)
        out[name] = (path, layout, TensorSpec(layout.hf_shape(spec.shape), spec.dtype))
    return out
