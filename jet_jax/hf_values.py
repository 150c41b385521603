"""The values of a Hugging Face config.json as they are read, and what architectures share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jet_jax.config import ModelConfig

_DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "bfloat16"}


class Values:
    """Config values with the architecture's defaults and errors that name the model type.

    Args:
      values: what config.json says.
      model_type: the architecture.
      defaults: what its configuration class takes where config.json is silent.
    """

    def __init__(
        self, values: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any] | None = None
    ):
        self.values = {**(defaults or {}), **values}
        self.model_type = model_type

    def get(self, key: str, default: Any = None) -> Any:
        """The value, or `default` where there is none or it is null."""
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """The value. Raises ValueError where there is none."""
        value = self.values.get(key)
        if value is None:
            raise ValueError(f"the {self.model_type} config has no {key!r}")
        return value

    def refuse(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raises ValueError where the value is set and none of the allowed ones."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{self.model_type} with {key}={value!r} is not supported "
                f"(only {' or '.join(repr(a) for a in allowed)})"
            )


def common(
    v: Values, layer_types: list[str], mixers: dict[str, Any], **changes: Any
) -> ModelConfig:
    """The model of these layers, everything else read by its usual key.

    Args:
      v: the config's values.
      layer_types: our name of each layer's type.
      mixers: options by layer type; those that no layer uses are left out.
      **changes: fields of the ModelConfig that are not read by the usual key.

    Raises:
      ValueError: a key is missing, or the values fit no model.
    """
    if v.get("num_hidden_layers", len(layer_types)) != len(layer_types):
        raise ValueError(
            f"num_hidden_layers={v.get('num_hidden_layers')} but layer_types has "
            f"{len(layer_types)} entries"
        )
    dtype = str(v.get("dtype", v.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ValueError(f"{v.model_type} with dtype={dtype!r} is not supported")
    fields = {
        "rms_norm_eps": float(v.get("rms_norm_eps", 1e-6)),
        "hidden_act": v.get("hidden_act", "silu"),
        "tie_word_embeddings": bool(v.need("tie_word_embeddings")),
        "max_position_embeddings": v.need("max_position_embeddings"),
        "initializer_range": float(v.get("initializer_range", 0.02)),
        "dtype": _DTYPES[dtype],
    }
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        fields[key] = v.get(key)
    used = {kind: options for kind, options in mixers.items() if kind in layer_types}
    return ModelConfig(
        vocab_size=v.need("vocab_size"),
        hidden_size=v.need("hidden_size"),
        intermediate_size=v.need("intermediate_size"),
        layer_types=tuple(layer_types),
        mixers=used,
        **(fields | changes),
    )
