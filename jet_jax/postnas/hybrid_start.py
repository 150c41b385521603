"""The first weights of a hybrid whose linear layers replace a teacher's attention.

As `initialise` does for a supernet's linear paths, but layer by layer, so that it serves every
mixer: RWKV-7's first layer has other weights than its later ones, which read its values.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jet_jax.config import ModelConfig
from jet_jax.distill import Teacher
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Context, Place
from jet_jax.models.lm import HybridLM
from jet_jax.params import split
from jet_jax.postnas.inherit import INITS, from_attention
from jet_jax.postnas.refit import NormalEquations, output_inputs, output_name
from jet_jax.step import Batch, cast_params

Mixers = dict[int, dict[str, Any]]  # weights by layer


def new_mixers(
    config: ModelConfig,
    teacher: Teacher,
    layers: Sequence[int],
    init: str,
    key: Array,
    batches: Iterable[Batch] = (),
    ridge: float = 1e-3,
) -> Mixers:
    """Weights of the layers that replace the teacher's attention.

    Args:
      config: the hybrid; `layers` are of one type.
      teacher: the model that is converted.
      layers: the layers that are new.
      init: `random`, `copy` or `copy_refit`, as in `initialise.linear_weights`. Windowed layers
        are the teacher's own whatever it says.
      key: typed key of the random numbers; a layer's follow from it and the layer's number.
      batches: what `copy_refit` fits on, some 64,000 tokens.
      ridge: see `refit`.

    Returns:
      float32 weights by layer.

    Raises:
      ValueError: an unknown `init`, a kind or shape that cannot be copied to, or no batch to fit
        on.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; use one of {', '.join(INITS)}")
    attention = {
        i: jax.tree.map(lambda x: x.astype(jnp.float32), teacher.params["layers"][i]["mixer"])
        for i in layers
    }
    if config.layer_types[layers[0]] == "swa":
        return attention
    fresh = _fresh(config, layers, key)
    if init == "random":
        return fresh
    mixers = {
        i: _copied(config, teacher.config, config.layer_types[i], attention[i], fresh[i])
        for i in layers
    }
    return mixers if init == "copy" else refit(config, teacher, mixers, batches, ridge)


def _fresh(config: ModelConfig, layers: Sequence[int], key: Array) -> Mixers:
    """Weights by the mixers' own initialisation."""
    return {
        i: _fresh_mixer(
            config, config.layer_types[i], config.is_first(i), jax.random.fold_in(key, i), i
        )
        for i in layers
    }


# Programs that all seeds share, so jitted here once.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _fresh_mixer(config: ModelConfig, kind: str, first: bool, key: Array, index: Any) -> Any:
    place = Place(index, first)
    return split(MIXERS[kind](config, config.options(kind), rngs=nnx.Rngs(key), place=place))[1]


@partial(jax.jit, static_argnums=(0, 1, 2))
def _copied(config: ModelConfig, teacher: ModelConfig, kind: str, attention: Any, fresh: Any):
    mixers = dict(teacher.mixers) | dict(config.mixers)
    return from_attention(config.replace(mixers=mixers), kind, attention, fresh)


@partial(jax.jit, static_argnums=2)
def _solved(sums: NormalEquations, kernel: Array, ridge: float) -> Array:
    return sums.solve(kernel, ridge)


def refit(
    config: ModelConfig,
    teacher: Teacher,
    mixers: Mixers,
    batches: Iterable[Batch],
    ridge: float = 1e-3,
) -> Mixers:
    """Fits the output projections to the attention's outputs, on the teacher's own stream.

    Args:
      config: the hybrid.
      teacher: the model that is converted.
      mixers: float32 weights by layer.
      batches: what to fit on.
      ridge: see `refit`.

    Returns:
      The weights with other output projections.

    Raises:
      ValueError: no batches, or a mixer without o_proj or out_proj.
    """
    name = output_name(next(iter(mixers.values())))
    model = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0)))
    structures = tuple((i, nnx.graphdef(model.layers[i].mixer)) for i in sorted(mixers))
    fixed = structures, teacher.graphdef, name, config.dtype
    sums = {i: NormalEquations.zeros(*mixers[i][name]["kernel"].shape) for i in mixers}
    has_batches = False
    for batch in batches:
        sums, has_batches = _add(*fixed, teacher.params, mixers, sums, batch), True
    if not has_batches:
        raise ValueError("init='copy_refit' fits the output projections: give it some batches")
    return {
        i: {
            **mixer,
            name: {**mixer[name], "kernel": _solved(sums[i], mixer[name]["kernel"], ridge)},
        }
        for i, mixer in mixers.items()
    }


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _add(
    structures: tuple[tuple[int, Any], ...],
    graphdef: Any,
    name: str,
    dtype: str,
    params: Any,
    mixers: Mixers,
    sums: dict[int, NormalEquations],
    batch: Batch,
) -> dict[int, NormalEquations]:
    """One batch's sums of all layers."""
    where = {key: batch[key] for key in ("segment_ids", "positions")}
    reader = nnx.merge(graphdef, params)
    collect = ("hidden_states", "mixer_outputs")
    features = reader.forward(batch["tokens"], **where, logits_at="none", collect=collect).features
    mask = batch["segment_ids"] != 0
    rows = {}
    for i, weights in cast_params(mixers, jnp.dtype(dtype)).items():
        h = reader.layers[i].input_layernorm(features["hidden_states"][i])
        goal = features["mixer_outputs"][i].astype(jnp.float32)
        if "bias" in weights[name]:
            goal = goal - weights[name]["bias"].astype(jnp.float32)
        rows[i] = weights, h, goal, sums[i]

    def one(structure, shared, row):
        weights, h, goal, before = row
        inputs, shared = output_inputs(structure, weights, h, Context(**where, shared=shared))
        return shared, before.add(inputs, goal, mask)

    out, shared = {}, {}
    for structure, pairs in itertools.groupby(structures, lambda pair: pair[1]):
        run = [i for i, _ in pairs]
        if len(run) == 1:  # the layer that hands something on first is alone in its run
            shared, out[run[0]] = one(structure, shared, rows[run[0]])
            continue
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *[rows[i] for i in run])
        shared, found = jax.lax.scan(partial(one, structure), shared, stacked)
        out |= {i: jax.tree.map(lambda x, n=n: x[n], found) for n, i in enumerate(run)}
    return out
