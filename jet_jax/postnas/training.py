"""The two training steps of a supernet: teacher-forced alignment, then sampled paths.

`make_align_step`: every layer's linear path reads the teacher's own input and learns to give the
attention's output. Layers meet only in the clipping of the gradient's norm, each gets a gradient at
every token, and nothing has to be differentiated through MLPs. (What cheap conversions begin with:
RADLADS, arXiv 2505.03005; arXiv 2512.20569; LoLCATs, arXiv 2410.10254. PostNAS prints no such
stage.)

`make_path_step`: PostNAS's own. A path drawn from the step runs on its own stream, and the loss
compares each attention sublayer's output with the teacher's, and the next-token distributions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jet_jax import losses, sharding
from jet_jax.accumulation import accumulate
from jet_jax.layer_errors import output_error
from jet_jax.postnas import supernet
from jet_jax.postnas.path_optim import PathOptimizer
from jet_jax.postnas.paths import LINEAR, PathLaw, sample_path
from jet_jax.postnas.supernet import Supernet
from jet_jax.step import Batch, Metrics, TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclass(frozen=True)
class PathLoss:
    """What a sampled path is trained on.

    Attributes:
      mse: weight of the mean over layers of the squared error of the attention sublayer's output
        (after its output projection, before the residual), over that layer's teacher variance.
      kl: weight of the mean KL(teacher || student) of the next token, in nats; 0 is the paper's
        figure, which draws the squared error alone.
      normalise: whether the squared error is divided by the teacher's variance.
    """

    mse: float = 1.0
    kl: float = 1.0
    normalise: bool = True

    def __post_init__(self) -> None:
        if self.mse < 0 or self.kl < 0 or self.mse + self.kl == 0:
            raise ValueError(f"loss weights mse={self.mse}, kl={self.kl}: one must be positive")


def token_mask(batch: Batch) -> Float[Array, "B T"]:
    """1 for the tokens of a batch that are real."""
    return (jnp.asarray(batch["segment_ids"]) != 0).astype(jnp.float32)


def align_errors(
    net: Supernet, params: Mapping[str, Any], batch: Batch, with_grads: bool = True
) -> tuple[Float[Array, " L"], Any]:
    """Errors of all linear paths on the teacher's own stream, and each layer's gradient.

    Args:
      net: the supernet.
      params: its weights.
      batch: `tokens`, `segment_ids`, `positions` [B, T].
      with_grads: whether the gradients are wanted.

    Returns:
      `output_error` of each layer, and the gradients of `params["linear"]` (None without).
    """
    ctx = net.context(batch["tokens"], batch["segment_ids"], batch["positions"])
    mask = token_mask(batch)
    dtype = jnp.dtype(net.config.dtype)

    def body(x, xs):
        choice, weights, linear = xs
        block = net.layer(weights)
        h = block.input_layernorm(x)
        target = net.mix(choice, weights, h, ctx)

        def error(linear):
            cast = supernet.cast_params({"linear": linear}, dtype)
            return output_error(net.mix(LINEAR, cast, h, ctx), target, mask)

        result = jax.value_and_grad(error)(linear) if with_grads else (error(linear), None)
        x = x + target
        return x + block.mlp(block.post_attention_layernorm(x)), result

    weights = net.per_layer(params, dtype)
    xs = (jnp.asarray(net.teacher_path), weights, params["linear"])
    return jax.lax.scan(body, net.embed(params, batch["tokens"]), xs)[1]


def path_loss(
    net: Supernet,
    params: Mapping[str, Any],
    path: Any,
    batch: Batch,
    loss: PathLoss,
    remat: str = "mixer",
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of one path on its own stream.

    Args:
      net: the supernet.
      params: its weights.
      path: int32 [L], may be traced.
      batch: `tokens`, `segment_ids`, `positions` [B, T].
      loss: what counts.
      remat: see `Supernet.run`.

    Returns:
      The weighted sum, and `mse` (mean over layers) and `kl` (nats a token) on their own.
    """
    mask = token_mask(batch)
    where = batch["tokens"], batch["segment_ids"], batch["positions"]

    def output(mixed, _):
        return mixed

    def error(mixed, target):
        return output_error(mixed, target, mask, loss.normalise)

    frozen = jax.lax.stop_gradient({k: v for k, v in params.items() if k != "full"})
    reference, targets = net.run(frozen, jnp.asarray(net.teacher_path), *where, each=output)
    hidden, errors = net.run(params, path, *where, each=error, targets=targets, remat=remat)
    head = net.head_kernel(frozen)
    mse, kl = errors.mean(), jnp.zeros(())
    if loss.kl:
        kl = losses.kl_loss(hidden, head, reference, head, mask) / jnp.maximum(mask.sum(), 1.0)
    return loss.mse * mse + loss.kl * kl, {"mse": mse, "kl": kl}


def init_state(params: Mapping[str, Any], optimizer: PathOptimizer) -> TrainState:
    """The state of a run that has done no step; "linear" and "full" train, "teacher" does not."""
    trainable = {k: v for k, v in params.items() if k != "teacher"}
    frozen = {"teacher": params["teacher"]}
    return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, optimizer.init(trainable))


def make_align_step(
    net: Supernet,
    optimizer: PathOptimizer,
    state: TrainState,
    mesh: Mesh,
    *,
    accumulation: int = 1,
) -> Step:
    """Builds the jitted alignment step, `step(state, batch) -> (state, metrics)`.

    Args:
      net: the supernet.
      optimizer: for the group "linear".
      state: the state or its shapes.
      mesh: the mesh; the caller keeps `jax.set_mesh(mesh)` in force.
      accumulation: as for `make_path_step`.

    Returns:
      The step; the old state's buffers are donated, but for the teacher's. Metrics: `loss` (mean
      of the layers' errors), `errors` [L], `grad_norm`, `lr`.
    """

    def align(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        tokens = jnp.maximum(token_mask(batch).sum(), 1.0)

        def share(params, part):
            found = align_errors(net, {**params, **state.frozen}, part)
            return jax.tree.map(lambda x: x * (token_mask(part).sum() / tokens), found)

        errors, grads = accumulate(share, state.params, batch, accumulation)
        active = {"linear": jnp.ones(net.num_layers, bool)}
        metrics = {"loss": errors.mean(), "errors": errors}
        return _updated(state, {"linear": grads}, optimizer, active, metrics, mesh)

    return _jit(align, state, mesh)


def make_path_step(
    net: Supernet,
    optimizer: PathOptimizer,
    state: TrainState,
    mesh: Mesh,
    *,
    law: PathLaw,
    loss: PathLoss,
    seed: int,
    accumulation: int = 1,
    remat: str = "mixer",
) -> Step:
    """Builds the jitted step on one sampled path, `step(state, batch) -> (state, metrics)`.

    The path follows from the seed and the step alone, so it is the same on every device, in every
    micro-batch and after a resume.

    Args:
      net: the supernet.
      optimizer: for "linear" and, where it trains, "full".
      state: the state or its shapes.
      mesh: the mesh; the caller keeps `jax.set_mesh(mesh)` in force.
      law: how paths are drawn.
      loss: what they are trained on.
      seed: of the paths.
      accumulation: parts of equally many rows that a batch is worked off in, to save memory. They
        count by their real tokens, so the loss is that of one large batch, but for the teacher's
        variance, which is each part's own.
      remat: what the backward pass computes again, see `Supernet.run`; "layer" saves memory.

    Returns:
      The step; the old state's buffers are donated, but for the teacher's. Metrics: `loss`,
      `mse`, `kl`, `grad_norm`, `lr`, `kept` (layers of the path that are not linear), `path` [L].
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        path = sample_path(law, key, jnp.asarray(net.teacher_path))
        tokens = jnp.maximum(token_mask(batch).sum(), 1.0)

        def total(params, part):
            params = {**params, **state.frozen}
            value, sums = path_loss(net, params, path, part, loss, remat)
            share = token_mask(part).sum() / tokens
            return value * share, jax.tree.map(lambda x: x * share, {"loss": value, **sums})

        grad = jax.grad(total, has_aux=True)
        grads, metrics = accumulate(grad, state.params, batch, accumulation)
        kept = path != LINEAR
        active = {"linear": ~kept, "full": kept}
        metrics = metrics | {"kept": kept.sum(), "path": path}
        return _updated(state, grads, optimizer, active, metrics, mesh)

    return _jit(step, state, mesh)


def _updated(state, grads, optimizer, active, metrics, mesh):
    grads = jax.lax.with_sharding_constraint(grads, supernet.shardings(grads, mesh))
    metrics = metrics | {
        "grad_norm": optax.tree.norm(grads),
        "lr": jnp.asarray(optimizer.schedule(state.step), jnp.float32),
    }
    trained = {name: state.params[name] for name in grads}
    old = {name: state.opt_state[name] for name in grads}
    params, opt_state = optimizer.update(grads, old, trained, active, state.step)
    params = state.params | params
    opt_state = state.opt_state | opt_state
    return TrainState(state.step + 1, params, state.frozen, opt_state), metrics


def _jit(step: Step, state: TrainState, mesh: Mesh) -> Step:
    """Compiles a step that donates what trains and leaves the teacher's weights to their owner."""

    def run(moving, frozen, batch):
        new, metrics = step(TrainState(*moving[:2], frozen, moving[2]), batch)
        return (new.step, new.params, new.opt_state), metrics

    moving = supernet.shardings((state.step, state.params, state.opt_state), mesh)
    jitted = jax.jit(
        run,
        in_shardings=(
            moving,
            supernet.shardings(state.frozen, mesh),
            sharding.batch_sharding(mesh),
        ),
        out_shardings=(moving, sharding.replicated(mesh)),
        donate_argnums=0,
    )

    @functools.wraps(jitted)
    def call(state, batch):
        moving = (state.step, state.params, state.opt_state)
        moving, metrics = jitted(moving, state.frozen, batch)
        return TrainState(*moving[:2], state.frozen, moving[2]), metrics

    return call
