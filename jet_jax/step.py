"""The training step and the evaluation step: pure functions of a state and a batch.

Precision: parameters, gradients and moments are float32; the weights are cast to the model's
compute dtype inside the loss, so the gradients come back in float32. Under `fsdp` the cast happens
on the shards and the gathers move the small dtype.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jet_jax import losses, optim, sharding
from jet_jax.accumulation import Batch, accumulate
from jet_jax.config import ModelConfig
from jet_jax.mixers.context import Place
from jet_jax.models.block import Block
from jet_jax.models.lm import HybridLM
from jet_jax.params import split

# Not cast: gates that need float32, and the two weights that are cast where they are used. The
# embedding's gradient is a scatter-add over tokens, which bfloat16 would round at every addition.
KEEP_FLOAT32 = r"(^|\.)(A_log|dt_bias|D|embed_tokens\.embedding|lm_head\.kernel)$"

Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """Everything that a training step changes, and the frozen weights.

    Attributes:
      step: updates done, int32 [].
      params: nested dict of the parameters that train, float32.
      frozen: nested dict of the parameters that do not.
      opt_state: state of the optimizer, for `params` only.
    """

    step: Any
    params: Any
    frozen: Any
    opt_state: Any

    def all_params(self) -> dict:
        """Trained and frozen parameters in one nested dict."""
        return optim.combine(self.params, self.frozen)


def abstract_model(config: ModelConfig, remat: str = "none") -> tuple[Any, dict]:
    """A model's structure and the shapes of its float32 weights.

    Args:
      config: the model.
      remat: what a layer keeps for its backward pass, see `jet_jax.models.remat`.

    Returns:
      `(graphdef, params)`, the latter a nested dict of `ShapeDtypeStruct`s.
    """
    model = nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0)))
    model.remat, model.scan_layers = remat, True
    graphdef, params = split(model)
    return graphdef, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)


def random_params(config: ModelConfig, mesh: Mesh, seed: int) -> dict:
    """Random float32 weights, each made where it will lie; equal on every mesh.

    One program makes all layers of a kind that have the same weights: compiling all in one takes
    minutes.

    Args:
      config: the model.
      mesh: the mesh.
      seed: seed of the random numbers.
    """
    key = jax.random.key(seed)
    where = sharding.shardings(abstract_model(config)[1], mesh)
    layer_shardings = where.pop("layers")

    def outside(key):
        model = HybridLM(config.replace(layer_types=config.layer_types[:1]), rngs=nnx.Rngs(key))
        return {name: part for name, part in split(model)[1].items() if name != "layers"}

    def layer(key, index, kind, first):
        return split(Block(config, kind, rngs=nnx.Rngs(key), place=Place(index, first)))[1]

    makers, layers = {}, {}
    for i, kind in enumerate(config.layer_types):
        # The first layer of a kind may have other weights than the later ones.
        sort = kind, jax.tree.structure(layer_shardings[i])
        if sort not in makers:
            make = partial(layer, kind=kind, first=config.is_first(i))
            makers[sort] = jax.jit(make, out_shardings=layer_shardings[i])
        layers[i] = makers[sort](jax.random.fold_in(key, i), i)
    key = jax.random.fold_in(key, config.num_layers)
    made = jax.jit(outside, out_shardings=where)(key) | {"layers": layers}
    return {name: made[name] for name in (*where, "layers")}


def init_state(
    params: PyTree, freeze: tuple[str, ...], optimizer: optax.GradientTransformation
) -> TrainState:
    """Builds the state of a run that has done no step.

    Args:
      params: nested dict of all parameters.
      freeze: patterns of frozen paths, see `optim.partition`.
      optimizer: from `optim.make_optimizer`.
    """
    trainable, frozen = optim.partition(params, freeze)
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def cast_params(params: PyTree, dtype: Any) -> PyTree:
    """Casts floating-point weights to a compute dtype, all but those of `KEEP_FLOAT32`."""

    def cast(path, x):
        keep = re.search(KEEP_FLOAT32, sharding.dotted(path))
        return x if keep or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def batch_loss(
    graphdef: Any, params: PyTree, batch: Batch, dtype: Any, z_loss: float = 0.0
) -> tuple[Float[Array, ""], Metrics]:
    """Sums the next-token loss of a batch, in nats; see `losses.cross_entropy`.

    Args:
      graphdef: the model's structure, from `params.split`.
      params: nested dict of all parameters.
      batch: `tokens`, `targets`, `segment_ids`, `positions` int32 [B,T], `loss_mask` float32 [B,T].
      dtype: compute dtype.
      z_loss: coefficient of the squared log-partition.

    Returns:
      `(total, sums)`: the differentiable sum, and `loss`, `tokens`, `correct`.
    """
    model = nnx.merge(graphdef, cast_params(params, dtype))
    out = model.forward(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        logits_at="none",
    )
    return losses.cross_entropy(
        out.hidden, model.head_kernel(), batch["targets"], batch["loss_mask"], z_loss=z_loss
    )


def make_train_step(
    graphdef: Any,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    state: TrainState,
    mesh: Mesh,
    *,
    dtype: Any,
    accumulation: int = 1,
    z_loss: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted training step.

    With accumulation the batch is worked off in equal parts, and the gradient is that of the mean
    over all tokens of the whole batch: parts with fewer tokens weigh less, so the result is that of
    one large batch.

    Args:
      graphdef: the model's structure.
      optimizer: from `optim.make_optimizer`.
      schedule: its learning rate, for the metrics.
      state: the state, or its `ShapeDtypeStruct`s; gives structure and shapes.
      mesh: the mesh; the caller keeps `jax.set_mesh(mesh)` in force.
      dtype: compute dtype.
      accumulation: number of parts that a batch is worked off in.
      z_loss: coefficient of the squared log-partition.

    Returns:
      `step(state, batch) -> (state, metrics)`; the old state's buffers are donated. Metrics are
      float32 scalars on device: `loss` (mean nats a token), `accuracy`, `tokens`, `grad_norm`
      (before clipping) and `lr`.
    """

    def loss(params: PyTree, batch: Batch) -> tuple[Float[Array, ""], Metrics]:
        return batch_loss(graphdef, params, batch, dtype, z_loss)

    return make_loss_step(loss, optimizer, schedule, state, mesh, accumulation=accumulation)


def make_loss_step(
    loss: Callable[..., tuple[Float[Array, ""], Metrics]],
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    state: TrainState,
    mesh: Mesh,
    *,
    accumulation: int = 1,
    others: tuple[PyTree, ...] = (),
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Builds the jitted training step of any loss that is a sum over tokens.

    Args:
      loss: `(params, batch, *others) -> (total, sums)`: the differentiable sum, and what the
        metrics are made of, summed over the tokens with `loss_mask`.
      optimizer: from `optim.make_optimizer`.
      schedule: its learning rate, for the metrics.
      state: the state, or its `ShapeDtypeStruct`s.
      mesh: the mesh; the caller keeps `jax.set_mesh(mesh)` in force.
      accumulation: number of parts that a batch is worked off in.
      others: weights, or their `ShapeDtypeStruct`s, that the loss reads and nobody trains.

    Returns:
      `step(state, batch, *others) -> (state, metrics)`; only the old state's buffers are donated.
      Metrics are as for `make_train_step`, `sums` over the tokens of the whole batch.
    """
    state_shardings = sharding.shardings(state, mesh)
    others_shardings = tuple(sharding.shardings(tree, mesh) for tree in others)

    def train_step(state: TrainState, batch: Batch, *others: PyTree) -> tuple[TrainState, Metrics]:
        tokens = jnp.maximum(batch["loss_mask"].sum(), 1.0)

        def mean_loss(params, part):
            total, sums = loss(optim.combine(params, state.frozen), part, *others)
            return total / tokens, sums

        grad = jax.grad(mean_loss, has_aux=True)
        grads, sums = accumulate(grad, state.params, batch, accumulation)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = _means(sums, tokens) | {
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(schedule(state.step), jnp.float32),
        }
        return TrainState(state.step + 1, params, state.frozen, opt_state), metrics

    return jax.jit(
        train_step,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), *others_shardings),
        # Without these a replicated vector may come back split after a step.
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(
    graphdef: Any, params: PyTree, mesh: Mesh, *, dtype: Any
) -> Callable[[PyTree, Batch], Metrics]:
    """Builds the jitted evaluation step: `(params, batch) -> {loss, tokens, correct}`, summed."""

    def eval_step(params: PyTree, batch: Batch) -> Metrics:
        return batch_loss(graphdef, params, batch, dtype)[1]

    return jax.jit(
        eval_step,
        in_shardings=(sharding.shardings(params, mesh), sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def evaluate(
    eval_step: Callable[[PyTree, Batch], Metrics],
    params: PyTree,
    batches: Iterable[Batch],
    mesh: Mesh,
) -> dict[str, float]:
    """Means over the tokens of batches: `loss` in nats a token, `accuracy`, ..., and `tokens`.

    Args:
      eval_step: from `make_eval_step`.
      params: nested dict of all parameters.
      batches: batches with this process's rows; at least one.
      mesh: the mesh.
    """
    sums = [eval_step(params, sharding.put_batch(batch, mesh)) for batch in batches]
    total = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
    return _means(total, max(total["tokens"], 1.0))


def _means(sums, tokens):
    """Sums over tokens as means of them, `tokens` itself left as it is."""
    means = {name: value / tokens for name, value in sums.items() if name != "tokens"}
    if "correct" in means:
        means["accuracy"] = means.pop("correct")
    return means | {"tokens": sums["tokens"]}
