"""Tokens a second of what a search and its final training spend their time on."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pilot.arms import Arms
from benchmarks.supernet import timed
from jet_jax import distill, metrics, optim, sharding
from jet_jax import step as model_step
from jet_jax.postnas import selectors
from jet_jax.postnas.objectives import Objective
from jet_jax.postnas.path_scores import PathScorer
from jet_jax.postnas.paths import path_of

# Tokens a second that the experiments were planned with, before anything was measured.
PLANNED = {"align": 200e3, "paths": 100e3, "score": 400e3, "full": 90e3}
STEPS = 12


def _long(shape: tuple[int, int], tokens: int, scaled: bool) -> tuple[int, int]:
    """The batch of a long run: the arm's length, and rows up to so many tokens."""
    return shape if scaled else (tokens // shape[1], shape[1])


def align(arms: Arms, scaled: bool) -> dict[str, Any]:
    """The teacher-forced step, 16,384 tokens of rows of 512."""
    shape = _long(arms.material.sizes.align, 16_384, scaled)
    return _step(arms, arms.align_step("gla"), shape)


def paths(arms: Arms, scaled: bool) -> dict[str, Any]:
    """The step on sampled paths, 32,768 tokens of rows of 2,048."""
    shape = _long(arms.material.sizes.path, 32_768, scaled)
    return _step(arms, arms.path_step(), shape)


def _step(arms: Arms, step: Any, shape: tuple[int, int]) -> dict[str, Any]:
    batch = sharding.put_batch(arms.material.batches(*shape, 1, 0)[0], arms.material.mesh)
    state = arms.state({"linear": _copied(arms)["linear"]})
    call = partial(step, peak=jnp.float32(1e-5), seed=jnp.int32(0))
    return {"shape": shape, **timed(call, state, batch, STEPS)[1]}


def score(arms: Arms, scaled: bool) -> dict[str, Any]:
    """Scoring candidates by KL on long rows: 16 a call, the teacher's pass shared by them."""
    rows = arms.material.text(4 if scaled else 32)
    net, chunk = arms.material.nets["gla"], 16
    rng = np.random.default_rng(0)
    sets = [rng.choice(net.num_layers, 2, replace=False).tolist() for _ in range(chunk)]
    candidates = [path_of(net.teacher_path, s) for s in sets]
    distinct = list({tuple(c.tolist()): c for c in candidates}.values())
    objective = Objective("text", rows, "kl")
    scorer = PathScorer(net, _copied(arms), [objective], arms.material.mesh, chunk=chunk)
    seconds = []
    for _ in range(3):
        scorer.known = {}
        begun = time.perf_counter()
        scorer(distinct)
        seconds.append(time.perf_counter() - begun)
    tokens = -(-len(rows.tokens) // 8) * 8 * rows.tokens.shape[1]
    best = min(seconds[1:])
    return {
        "shape": (8, rows.tokens.shape[1]),
        "compile_s": seconds[0] - best,
        "ms": 1e3 * best,
        "tokens_s": chunk * tokens / best,
        **metrics.memory_bytes(),
    }


def full(arms: Arms, scaled: bool) -> dict[str, Any]:
    """All weights of a hybrid with two full layers trained on KL, the teacher's pass included."""
    net = arms.material.nets["gla"]
    path = path_of(net.teacher_path, selectors.uniform(net.num_layers, 2))
    config = net.hybrid(path)
    weights = net.extract(_copied(arms), path)
    weights = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), weights)
    graphdef, shapes = model_step.abstract_model(config, "full")
    optimizer, schedule = optim.make_optimizer(optim.OptimConfig(lr=1e-5), 1000, shapes)
    teacher = distill.Teacher.of(arms.material.model)
    settings = distill.DistillConfig(arms.material.config.teacher, mse=0.0, kl=1.0)
    state = model_step.init_state(weights, (), optimizer)
    step = distill.make_distill_step(
        settings, graphdef, teacher, optimizer, schedule, state, arms.material.mesh,
        dtype=jnp.dtype(config.dtype),
    )  # fmt: skip

    def call(state, batch):
        return step(state, batch, teacher.params)

    shape = _long(arms.material.sizes.path, 32_768, scaled)
    batch = sharding.put_batch(arms.material.batches(*shape, 1, 0)[0], arms.material.mesh)
    return {"shape": shape, **timed(call, state, batch, STEPS)[1]}


def _copied(arms: Arms) -> dict[str, Any]:
    return {"teacher": arms.material.teacher, "linear": arms.material.start("gla", "copy", 0)}


PIECES = {"align": align, "paths": paths, "score": score, "full": full}
