"""Single mixers and the state dicts of flash-linear-attention's layers.

Names and layouts are those of `hf_names.MIXER_TABLE`. Whole models go through `jet_jax.load` and
`jet-jax convert`; this is for layers, such as an RWKV-7 or Mamba2 layer out of another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jet_jax.copying import contiguous_copy
from jet_jax.hf_names import mixer_name
from jet_jax.params import flatten, split, unflatten
from jet_jax.safetensors_files import TensorSpec
from jet_jax.weight_checks import check_weights


def load_mixer(mixer: nnx.Module, tensors: Mapping[str, Any]) -> None:
    """Gives a mixer the weights of an FLA layer, in the mixer's own dtypes.

    Args:
      mixer: one of `jet_jax.mixers.MIXERS`, changed in place.
      tensors: the layer's state dict: numpy arrays by name, such as `q_proj.weight`.

    Raises:
      ValueError: names or shapes are not those of the mixer; all of them are listed.
    """
    weights = flatten(split(mixer)[1])
    names = {mixer_name(path)[0]: (path, mixer_name(path)[1]) for path in weights}
    expected = {
        name: layout.hf_shape(weights[path].shape) for name, (path, layout) in names.items()
    }
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    found = {name: TensorSpec(array.shape, array.dtype) for name, array in arrays.items()}
    check_weights(expected, found, "the state dict", type(mixer).__name__)
    loaded = {}
    for name, (path, layout) in names.items():
        ours = weights[path]
        view = layout.to_ours(arrays[name], ours.shape)
        loaded[path] = jnp.asarray(contiguous_copy(view, ours.dtype))
    nnx.update(mixer, unflatten(loaded))


def mixer_state_dict(mixer: nnx.Module) -> dict[str, np.ndarray]:
    """The inverse of `load_mixer`: a mixer's weights under FLA's names, in FLA's layout."""
    out = {}
    for path, array in flatten(split(mixer)[1]).items():
        name, layout = mixer_name(path)
        out[name] = np.ascontiguousarray(layout.to_hf(np.asarray(array)))
    return out
