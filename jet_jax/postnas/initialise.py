"""The linear paths' first weights: random, copied from the attention, or copied and refitted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jet_jax.postnas.inherit import INITS, from_attention
from jet_jax.postnas.refit import NormalEquations, output_inputs, output_name
from jet_jax.postnas.supernet import Supernet
from jet_jax.step import Batch


def linear_weights(
    net: Supernet,
    teacher: Mapping[str, Any],
    init: str,
    key: Array,
    batches: Iterable[Batch] = (),
    ridge: float = 1e-3,
) -> dict[str, Any]:
    """The linear paths' weights before any training.

    Args:
      net: the supernet.
      teacher: the teacher's weights, layers stacked.
      init: `random`, the kind's own initialisation; `copy`, q, k, v and o of the attention
        (`inherit.from_attention`); `copy_refit`, with the output projection fitted to the
        attention's outputs on the batches.
      key: typed key of the random numbers; the same in every arm of a comparison.
      batches: what `copy_refit` fits on, some 64,000 tokens.
      ridge: see `refit`.

    Returns:
      Stacked weights [L, ...], float32.

    Raises:
      ValueError: an unknown `init`, a kind that cannot be copied to, or no batch to fit on.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is unknown; use one of {', '.join(INITS)}")
    fresh = jax.jit(net.random_linear)(key)
    if init == "random":
        return fresh
    attention = jax.tree.map(lambda x: x.astype(jnp.float32), teacher["layers"]["mixer"])
    start = jax.vmap(partial(from_attention, net.config, net.kind))
    linear = jax.jit(start)(attention, fresh)
    if init == "copy":
        return linear
    sums, add = None, jax.jit(partial(_add, net))
    for batch in batches:
        sums = add({"teacher": teacher, "linear": linear}, sums, batch)
    if sums is None:
        raise ValueError("init='copy_refit' fits the output projections: give it some batches")
    name = output_name(linear)
    solve = jax.jit(jax.vmap(lambda s, w: s.solve(w, ridge)))
    return {**linear, name: {**linear[name], "kernel": solve(sums, linear[name]["kernel"])}}


def _add(net: Supernet, params: Mapping[str, Any], sums: Any, batch: Batch) -> Any:
    """One batch's sums of all layers, on the teacher's own stream."""
    ctx = net.context(batch["tokens"], batch["segment_ids"], batch["positions"])
    mask = batch["segment_ids"] != 0
    name = output_name(params["linear"])

    def body(x, xs):
        choice, weights, sums = xs
        block = net.layer(weights)
        h = block.input_layernorm(x)
        target = net.mix(choice, weights, h, ctx)
        rows, _ = output_inputs(net.structure(net.kind), weights["linear"], h, ctx)
        goal = target.astype(jnp.float32)
        if "bias" in weights["linear"][name]:
            goal = goal - weights["linear"][name]["bias"]
        if sums is None:
            sums = NormalEquations.zeros(rows.shape[-1], goal.shape[-1])
        x = x + target
        return x + block.mlp(block.post_attention_layernorm(x)), sums.add(rows, goal, mask)

    weights = net.per_layer(params, jnp.dtype(net.config.dtype))
    xs = (jnp.asarray(net.teacher_path), weights, sums)
    return jax.lax.scan(body, net.embed(params, batch["tokens"]), xs)[1]
