"""Distillation: a hybrid learns its teacher's mixer outputs and predictions.

The student runs on its own stream. Its loss is a weighted sum of

* `mse`: the squared error of each mixer's output (after the output projection, before the
  residual) over the variance of the teacher's in that layer, meaned over layers;
* `kl`: KL(teacher || student) of the next token at temperature 1, in nats;
* `ce`: cross-entropy with the text, in nats.

PostNAS (arXiv 2508.15884 §2.2, figure 4) draws the squared error; the KL is what other conversions
end with (RADLADS, arXiv 2505.03005; arXiv 2512.20569). `forced` is what those begin with: every
mixer reads the teacher's own input, and learns alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from jet_jax import io, losses, sharding
from jet_jax.config import ModelConfig
from jet_jax.layer_errors import forced_errors, output_error
from jet_jax.models.lm import HybridLM, Output
from jet_jax.params import split
from jet_jax.step import Batch, Metrics, TrainState, cast_params, make_loss_step

WEIGHTS = ("mse", "kl", "ce")


@dataclass(frozen=True)
class DistillConfig:
    """What a student learns from, and how much each part counts.

    Attributes:
      teacher: directory of the teacher, a model of the same vocabulary and, with `mse`, the same
        width and number of layers.
      mse: weight of the mixers' squared error.
      kl: weight of KL(teacher || student).
      ce: weight of the cross-entropy with the text.
      normalise: whether the squared error is divided by the teacher's variance in that layer.
      forced: whether every mixer reads the teacher's normalised input of its layer, so that each
        learns alone. Only layers of another type than the teacher's count; needs kl=0 and ce=0.
    """

    teacher: str
    mse: float = 1.0
    kl: float = 1.0
    ce: float = 0.0
    normalise: bool = True
    forced: bool = False

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("distill.teacher is missing; name the directory of the teacher.")
        for name in WEIGHTS:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"distill.{name}={getattr(self, name)} must be 0 or positive.")
        if not any(getattr(self, name) for name in WEIGHTS):
            raise ValueError("distill: one of mse, kl and ce must be positive.")
        if self.forced and (self.kl or self.ce):
            raise ValueError(
                "distill.forced trains each mixer alone, and no next token comes out; set kl and "
                f"ce to 0 (distill.kl={self.kl}, distill.ce={self.ce})."
            )


@dataclass(frozen=True)
class Teacher:
    """A model that does not train: its config, structure and weights in the compute dtype."""

    config: ModelConfig
    graphdef: Any
    params: Any

    @classmethod
    def of(cls, model: HybridLM) -> Teacher:
        """A model in memory as a teacher; its weights are cast to the dtype that it computes in."""
        model = nnx.merge(*nnx.split(model))  # another object with the same arrays
        model.scan_layers, model.remat = True, "none"
        graphdef, params = split(model)
        return cls(model.config, graphdef, cast_params(params, jnp.dtype(model.config.dtype)))


def check_teacher(config: DistillConfig, student: ModelConfig) -> ModelConfig:
    """Reads the teacher's config and checks that the student can learn from it.

    Args:
      config: the distillation.
      student: the student.

    Returns:
      The teacher's config.

    Raises:
      ValueError: no model is there; its vocabulary is not the student's, nor, with `mse`, its width
        and number of layers; or, with `forced`, no layer's type differs.
    """
    try:
        teacher = io.load_config(config.teacher)
    except ValueError as error:
        raise ValueError(f"distill.teacher: {error}") from error
    for name in ("vocab_size", "hidden_size", "num_layers")[: 3 if config.mse else 1]:
        there, here = getattr(teacher, name), getattr(student, name)
        if there != here:
            way_out = "" if name == "vocab_size" else ", or distill.mse=0"
            raise ValueError(
                f"distill.teacher: {config.teacher} has {name}={there}, the student {here}; take a "
                f"teacher with the same {name}{way_out}."
            )
    if config.forced and teacher.layer_types == student.layer_types:
        raise ValueError(
            f"distill.forced: the student's layer types are those of {config.teacher}, so that no "
            "layer would train."
        )
    return teacher


def load_teacher(directory: str, dtype: str, mesh: Mesh | None = None) -> Teacher:
    """Loads a teacher.

    Args:
      directory: as for `jet_jax.load`.
      dtype: "bfloat16" or "float32", for weights and computation.
      mesh: the mesh that the weights are spread over; None puts them on the default device.
    """
    return Teacher.of(io.load(directory, dtype=dtype, mesh=mesh))


def distill_loss(
    config: DistillConfig,
    student: HybridLM,
    teacher: HybridLM,
    batch: Batch,
    z_loss: float = 0.0,
    forced_layers: Sequence[int] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of a batch, summed over its tokens.

    Args:
      config: the distillation.
      student: the student; float32 embedding and head get a float32 gradient.
      teacher: the teacher; gets no gradient.
      batch: `tokens`, `targets`, `segment_ids`, `positions` int32 [B,T], `loss_mask` float32 [B,T],
        which says the tokens that all parts of the loss are over.
      z_loss: coefficient of the squared log-partition, beside `ce`.
      forced_layers: with `forced`, the layers whose errors count; None takes those whose type
        differs from the teacher's.

    Returns:
      `(total, sums)`: the differentiable sum, and `loss` (the same without the z term), those of
      `mse`, `kl` and `ce` that are in use, `tokens` and, with `ce`, `correct`. The sum of `mse` is
      its mean, over the variance in this batch, times the tokens.
    """
    mask = batch["loss_mask"]
    parts: Metrics = {}
    sums: Metrics = {"tokens": mask.sum()}
    if config.forced:
        errors = forced_errors(student, teacher, batch, config.normalise, forced_layers)
        parts["mse"] = errors.mean() * mask.sum()
    else:
        collect = ("mixer_outputs",) if config.mse else ()
        out, reference = (_run(model, batch, collect) for model in (student, teacher))
        if config.mse:
            pairs = zip(*(x.features["mixer_outputs"] for x in (out, reference)), strict=True)
            errors = [output_error(y, target, mask, config.normalise) for y, target in pairs]
            parts["mse"] = jnp.stack(errors).mean() * mask.sum()
        if config.kl:
            parts["kl"] = _summed_kl(student, out, teacher, reference, mask)
        if config.ce:
            head = student.head_kernel()
            total, own = losses.cross_entropy(
                out.hidden, head, batch["targets"], mask, z_loss=z_loss
            )
            parts["ce"] = total
            sums |= {"ce": own["loss"], "correct": own["correct"]}
    total = sum((getattr(config, name) * x for name, x in parts.items()), jnp.zeros(()))
    sums = jax.lax.stop_gradient(parts | sums)
    loss = sum((getattr(config, name) * sums[name] for name in parts), jnp.zeros(()))
    return total, sums | {"loss": loss}


def make_distill_step(
    config: DistillConfig,
    graphdef: Any,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    state: TrainState,
    mesh: Mesh,
    *,
    dtype: Any,
    accumulation: int = 1,
    z_loss: float = 0.0,
) -> Callable[[TrainState, Batch, PyTree], tuple[TrainState, Metrics]]:
    """Builds the jitted step that distils, as `step.make_train_step` does the one that trains.

    Args:
      config: the distillation.
      graphdef: the student's structure.
      teacher: the teacher; its weights may be `ShapeDtypeStruct`s here.
      optimizer: from `optim.make_optimizer`.
      schedule: its learning rate, for the metrics.
      state: the student's state, or its `ShapeDtypeStruct`s.
      mesh: the mesh; the caller keeps `jax.set_mesh(mesh)` in force.
      dtype: compute dtype of the student; the teacher has its own.
      accumulation: number of parts that a batch is worked off in. The squared error is normalised
        by the variance in each part, and parts count by their tokens.
      z_loss: coefficient of the squared log-partition, beside `ce`.

    Returns:
      `step(state, batch, teacher.params) -> (state, metrics)`; the old state's buffers are donated,
      the teacher's are not. Metrics: `loss`, those of `mse` (mean over layers), `kl` and `ce` (nats
      a token) that are in use, `tokens`, `grad_norm`, `lr` and, with `ce`, `accuracy`.
    """

    def loss(params: PyTree, batch: Batch, guide: PyTree) -> tuple[Float[Array, ""], Metrics]:
        student = nnx.merge(graphdef, cast_params(params, dtype))
        return distill_loss(config, student, nnx.merge(teacher.graphdef, guide), batch, z_loss)

    return make_loss_step(
        loss, optimizer, schedule, state, mesh, accumulation=accumulation, others=(teacher.params,)
    )


def make_distill_eval_step(
    graphdef: Any, params: PyTree, teacher: Teacher, mesh: Mesh, *, dtype: Any
) -> Callable[[PyTree, Batch, PyTree], Metrics]:
    """Builds the jitted evaluation beside a teacher.

    Returns:
      `(params, batch, teacher.params) -> {loss, tokens, correct, kl}`, summed; `loss` is that of
      the next token, as in `step.make_eval_step`, and the student runs on its own stream.
    """

    def eval_step(params: PyTree, batch: Batch, guide: PyTree) -> Metrics:
        student = nnx.merge(graphdef, cast_params(params, dtype))
        reader = nnx.merge(teacher.graphdef, guide)
        out, reference = (_run(model, batch, ()) for model in (student, reader))
        mask = batch["loss_mask"]
        sums = losses.cross_entropy(out.hidden, student.head_kernel(), batch["targets"], mask)[1]
        return sums | {"kl": _summed_kl(student, out, reader, reference, mask)}

    return jax.jit(
        eval_step,
        in_shardings=(
            sharding.shardings(params, mesh),
            sharding.batch_sharding(mesh),
            sharding.shardings(teacher.params, mesh),
        ),
        out_shardings=sharding.replicated(mesh),
    )


def make_steps(
    config: DistillConfig,
    graphdef: Any,
    teacher: Teacher,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], Any],
    state: TrainState,
    mesh: Mesh,
    **how: Any,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both steps with the teacher's weights at hand, for a loop that knows of no teacher.

    Args:
      config, graphdef, teacher, optimizer, schedule, state, mesh: as for `make_distill_step`.
      how: its keywords.

    Returns:
      `(state, batch) -> (state, metrics)` and `(params, batch) -> sums`.
    """
    train = make_distill_step(config, graphdef, teacher, optimizer, schedule, state, mesh, **how)
    evaluate = make_distill_eval_step(
        graphdef, state.all_params(), teacher, mesh, dtype=how["dtype"]
    )
    return (
        lambda state, batch: train(state, batch, teacher.params),
        lambda params, batch: evaluate(params, batch, teacher.params),
    )


def flops_per_token(
    config: DistillConfig, student: ModelConfig, teacher: ModelConfig, context: int
) -> float:
    """FLOPs of a distillation step a token: the student's three passes, the teacher's one.

    As in `ModelConfig.flops_per_token` nothing is taken off for weights that do not train, nor
    added for what remat computes again. A head that no part of the loss needs is not run.
    """

    def forward(model: ModelConfig, head: bool) -> float:
        return model.flops_per_token(context) - 2 * model.vocab_size * model.hidden_size * (
            not head
        )

    reads = forward(teacher, config.kl > 0) if config.mse or config.kl else 0.0
    if not config.forced:
        return 3 * forward(student, config.kl + config.ce > 0) + reads
    mixers = 0.0
    for i, kind in enumerate(student.layer_types):
        if kind != teacher.layer_types[i]:
            options = student.options(kind)
            mixers += 2 * options.matmul_params(student.hidden_size, student.is_first(i))
            mixers += options.mixing_flops(context, student.hidden_size)
    return 3 * mixers + reads


def _run(model: HybridLM, batch: Batch, collect: tuple[str, ...]) -> Output:
    return model.forward(
        batch["tokens"],
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        logits_at="none",
        collect=collect,
    )


def _summed_kl(student, out, teacher, reference, mask):
    heads = student.head_kernel(), teacher.head_kernel()
    return losses.kl_loss(out.hidden, heads[0], reference.hidden, heads[1], mask)
