"""How far a student's mixers are from its teacher's, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jet_jax.mixers.context import Context
from jet_jax.models.lm import HybridLM
from jet_jax.models.remat import remat


def output_error(
    output: Float[Array, "B T D"],
    target: Float[Array, "B T D"],
    mask: Float[Array, "B T"],
    normalise: bool = True,
) -> Float[Array, ""]:
    """Mean squared error over the real tokens, over the target's variance.

    Args:
      output: a mixer's output.
      target: the teacher's; gets no gradient.
      mask: 1 for real tokens.
      normalise: whether to divide by the variance, of this batch.
    """
    weight = mask[..., None] / jnp.maximum(mask.sum() * output.shape[-1], 1.0)
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    error = (weight * (output.astype(jnp.float32) - target) ** 2).sum()
    if not normalise:
        return error
    mean = (weight * target).sum()
    return error / jnp.maximum((weight * (target - mean) ** 2).sum(), 1e-12)


def forced_errors(
    student: HybridLM,
    teacher: HybridLM,
    batch: dict[str, Any],
    normalise: bool = True,
    counted: Sequence[int] | None = None,
) -> Float[Array, " N"]:
    """Errors of the student's mixers, each fed with the teacher's own input of its layer.

    What a mixer hands on to later layers (RWKV-7's first values) is the student's, without
    gradient, so that each layer learns alone.

    Args:
      student: the student.
      teacher: the teacher, of the same width and number of layers.
      batch: `tokens`, `segment_ids`, `positions` int32 [B,T] and `loss_mask` float32 [B,T].
      normalise: whether each error is over the variance of the teacher's output.
      counted: the layers whose errors are asked for; None takes those whose type differs from the
        teacher's.

    Returns:
      `output_error` of each counted layer, in order.
    """
    where = {name: batch[name] for name in ("segment_ids", "positions")}
    collect = ("hidden_states", "mixer_outputs")
    features = teacher.forward(batch["tokens"], **where, logits_at="none", collect=collect).features
    structures = [nnx.graphdef(layer.mixer) for layer in student.layers]
    kinds = zip(student.config.layer_types, teacher.config.layer_types, strict=True)
    differs = [here != there for here, there in kinds]
    counts = differs if counted is None else [i in set(counted) for i in range(len(differs))]
    norm_structure = nnx.graphdef(teacher.layers[0].input_layernorm)
    rows = [
        (_weights(layer.mixer), _weights(guide.input_layernorm), x, target)
        for layer, guide, x, target in zip(
            student.layers, teacher.layers, *(features[name] for name in collect), strict=False
        )  # the last hidden state is no layer's input
    ]

    def one(structure, shared, row):
        mixer, norm, x, target = row
        h = nnx.merge(norm_structure, norm)(x)
        y, _, shared = nnx.merge(structure, mixer)(h, Context(**where, shared=shared))
        error = output_error(y, target, batch["loss_mask"], normalise)
        return jax.lax.stop_gradient(shared), error

    shared, errors = {}, []
    layers = range(len(rows))
    # Equal neighbours run as one loop on the device, as in `HybridLM`.
    for (structure, wanted), run in itertools.groupby(layers, lambda i: (structures[i], counts[i])):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *[rows[i] for i in run])
        length = len(jax.tree.leaves(stacked)[-1])
        body = remat(lambda s, row, g=structure: one(g, s, row), student.remat, in_scan=length > 1)
        if length == 1:  # the layer that hands something on first is alone in its run
            shared, error = body(shared, jax.tree.map(lambda x: x[0], stacked))
            found = error[None]
        else:
            shared, found = jax.lax.scan(body, shared, stacked)
        errors += [found] if wanted else []
    return jnp.concatenate(errors)


def _weights(module: nnx.Module) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module))
