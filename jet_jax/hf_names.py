"""The one table of weight names and layouts between this project and Hugging Face.

A row gives our dotted path, the Hugging Face name and how the array is laid out there. `#` stands
for a layer number, `*` for one or more name parts; the first row that matches a path counts. The
table is read in both directions: which weights a model has follows from its config, so the
inverse is over that finite set.

Sources: transformers' Qwen2, Qwen3, Llama and Gemma 3 modules; the Jet-Nemotron repository;
flash-linear-attention 0.6.0.
"""

import enum
import re
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from jet_jax.config import ModelConfig
from jet_jax.hf_config_fla import FLA_MODEL_TYPES
from jet_jax.placing import weight_specs
from jet_jax.safetensors_files import TensorSpec


class Layout(enum.Enum):
    """How the Hugging Face array is laid out, against ours.

    SAME: equal. TRANSPOSED: [out, in] for our [in, out]. TAPS: [VD·W, R], row c·W + j for channel
    c and tap j, for our [R, W, VD]. TAP_BIAS: [VD·W] for our [W, VD]. CONV: [C, 1, W] for our
    [W, C].
    """

    SAME = "same"
    TRANSPOSED = "transposed"
    TAPS = "taps"
    TAP_BIAS = "tap bias"
    CONV = "conv"

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
        if self is Layout.CONV:
            return array[:, 0].T
        return array

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Returns the array in the Hugging Face layout, a view where one exists."""
        if self is Layout.TRANSPOSED:
            return array.T
        if self is Layout.TAPS:
            return array.transpose(2, 1, 0).reshape(-1, array.shape[0])
        if self is Layout.TAP_BIAS:
            return array.T.reshape(-1)
        if self is Layout.CONV:
            return array.T[:, None]
        return array

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the Hugging Face shape of an array of our `shape`."""
        # A broadcast scalar of that shape takes no memory and knows what a layout does to it.
        return self.to_hf(np.broadcast_to(np.int8(0), shape)).shape


Table = tuple[tuple[str, str, Layout], ...]
NO_RENAMES: Mapping[str, str] = MappingProxyType({})

# Within a mixer. Names are those of flash-linear-attention's layers and of Jet-Nemotron's module.
_GENERATOR = "dynamic_conv1d.kernel_generator"
MIXER_TABLE: Table = (
    ("generator.w1", f"{_GENERATOR}.w1.weight", Layout.TRANSPOSED),
    ("generator.w2", f"{_GENERATOR}.w2.weight", Layout.TAPS),
    ("generator.b2", f"{_GENERATOR}.w2.bias", Layout.TAP_BIAS),
    # A low-rank pair is a list of modules there, numbered; RWKV-7 counts the activation between.
    ("*_lora.down.kernel", "*_lora.lora.0.weight", Layout.TRANSPOSED),
    ("*_lora.up.kernel", "*_lora.lora.2.weight", Layout.TRANSPOSED),
    ("*_lora.up.bias", "*_lora.lora.2.bias", Layout.SAME),
    ("*.down.kernel", "*.0.weight", Layout.TRANSPOSED),
    ("*.up.kernel", "*.1.weight", Layout.TRANSPOSED),
    ("*.up.bias", "*.1.bias", Layout.SAME),
    ("*.taps", "*.weight", Layout.CONV),
    ("*.kernel", "*.weight", Layout.TRANSPOSED),
    ("*.scale", "*.weight", Layout.SAME),
    ("*", "*", Layout.SAME),  # biases, A_log, dt_bias and other vectors keep their names
)
TABLE: Table = (
    ("embed_tokens.embedding", "model.embed_tokens.weight", Layout.SAME),
    ("norm.scale", "model.norm.weight", Layout.SAME),
    ("lm_head.kernel", "lm_head.weight", Layout.TRANSPOSED),
    ("layers.#.mlp.*.kernel", "model.layers.#.mlp.*.weight", Layout.TRANSPOSED),
    *(
        (f"layers.#.mixer.{ours}", f"model.layers.#.self_attn.{theirs}", layout)
        for ours, theirs, layout in MIXER_TABLE
    ),
    ("layers.#.*.scale", "model.layers.#.*.weight", Layout.SAME),  # the norms of a layer
)
HEAD = "lm_head.weight"

# What the models of flash-linear-attention call the same things.
FLA_NAMES = {
    "model.embed_tokens.": "model.embeddings.",
    ".self_attn.": ".attn.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".mlp_norm.",
}

# Buffers that old checkpoints carry and that follow from the config.
KNOWN_BUFFERS = re.compile(r"(^|\.)rotary_emb(_local)?\.")


def _translate(table: Table, path: str) -> tuple[str, Layout] | None:
    """Name and layout by the first row that matches; None if none does."""
    for ours, theirs, layout in table:
        pattern = re.escape(ours).replace(r"\#", r"(\d+)").replace(r"\*", "(.+)")
        match = re.fullmatch(pattern, path)
        if match:
            parts = iter(match.groups())
            return re.sub(r"[#*]", lambda _: next(parts), theirs), layout  # noqa: B023
    return None


def mixer_name(path: str) -> tuple[str, Layout]:
    """Translates a weight's dotted path within a mixer.

    Args:
      path: for example `q_proj.kernel`.

    Returns:
      The name in the state dict of FLA's layer and the layout there.
    """
    found = _translate(MIXER_TABLE, path)
    assert found is not None, "the last row matches everything"
    return found


def hf_name(path: str, renames: Mapping[str, str] = NO_RENAMES) -> tuple[str, Layout]:
    """Translates a weight's dotted path.

    Args:
      path: for example `layers.3.mixer.q_proj.kernel`.
      renames: parts of the name to replace, from `renames_of`.

    Returns:
      The Hugging Face name and the layout there.

    Raises:
      ValueError: no row of the table matches.
    """
    found = _translate(TABLE, path)
    if found is None:
        raise ValueError(
            f"weight {path!r} has no Hugging Face name; add a row to TABLE in jet_jax/hf_names.py"
        )
    name, layout = found
    for ours, theirs in renames.items():
        name = name.replace(ours, theirs, 1)
    return name, layout


def renames_of(config: ModelConfig) -> Mapping[str, str]:
    """How the names of a model's architecture, as its config.json tells it, differ from `TABLE`."""
    return FLA_NAMES if config.to_hf()["model_type"] in FLA_MODEL_TYPES else NO_RENAMES


def embedding_name(config: ModelConfig) -> str:
    """The Hugging Face name of a model's embedding."""
    return hf_name("embed_tokens.embedding", renames_of(config))[0]


def expected(config: ModelConfig) -> dict[str, tuple[str, Layout, tuple[int, ...]]]:
    """Lists the weights of a model under their Hugging Face names.

    Args:
      config: the model.

    Returns:
      Hugging Face name → (our dotted path, layout, our shape).
    """
    out = {}
    renames = renames_of(config)
    for path, spec in weight_specs(config).items():
        name, layout = hf_name(path, renames)
        assert name not in out, f"{path} and {out[name][0]} are both {name}"
        out[name] = (path, layout, spec.shape)
    return out


def hf_specs(
    specs: dict[str, TensorSpec], renames: Mapping[str, str] = NO_RENAMES
) -> dict[str, tuple[str, Layout, TensorSpec]]:
    """Translates names and shapes of stored weights.

    Args:
      specs: shape and dtype by our dotted path.
      renames: parts of the names to replace, from `renames_of`.

    Returns:
      Hugging Face name → (our dotted path, layout, shape and dtype there).
    """
    out = {}
    for path, spec in specs.items():
        name, layout = hf_name(path, renames)
        out[name] = (path, layout, TensorSpec(layout.hf_shape(spec.shape), spec.dtype))
    return out
