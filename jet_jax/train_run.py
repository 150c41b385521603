"""A training run: everything built or restored, then the loop. `train.py` is its command."""

import math
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jet_jax import (
    data,
    distill,
    io,
    metrics,
    optim,
    params,
    processes,
    sharding,
    step,
)
from jet_jax.config import ModelConfig
from jet_jax.progress import Display, parameter_table
from jet_jax.stopping import StopRequest
from jet_jax.text_samples import TextSampler
from jet_jax.train_checkpoint import TrainCheckpoints
from jet_jax.train_config import TrainConfig


@dataclass
class Run:
    """All that the loop works with."""

    config: TrainConfig
    workdir: Path
    model: ModelConfig
    mesh: Mesh
    state: step.TrainState
    train_step: Any
    eval_step: Any
    train: data.TrainIterator
    valid: list
    checkpoints: TrainCheckpoints
    sample: TextSampler | None
    stack: ExitStack  # what has to be closed in the end
    flops_per_token: float = 0.0  # of a step
    stopped: bool = False  # whether the loop was asked to stop, be it in its last step


def prepare(config: TrainConfig, workdir: Path) -> Run:
    """Builds or restores everything. What is wrong with the settings comes up here."""
    # ---- devices ------------------------------------------------------------------------------
    processes.start(config.distributed, config.compile_cache)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    sharding.check_batch(config.data.batch_size, mesh, config.accumulation)
    display = Display(config.steps, live=False)
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    display.say(f"{jax.device_count()} x {jax.devices()[0].device_kind}; mesh {sizes}")

    # ---- model: what it is, not yet its weights -----------------------------------------------
    checkpoints = TrainCheckpoints(workdir, config.keep_checkpoints)
    model = checkpoints.resolve_model(config.model, config.init_from)
    model = model.replace(dtype=config.dtype or model.dtype)
    dtype = jnp.dtype(model.dtype)
    graphdef, shapes = step.abstract_model(model, config.remat)
    flops = 3 * model.flops_per_token(config.data.seq_len)
    if config.distill is not None:
        guide = distill.check_teacher(config.distill, model)
        flops = distill.flops_per_token(config.distill, model, guide, config.data.seq_len)

    # ---- data ---------------------------------------------------------------------------------
    share = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    train = data.make_train_iterator(config.data, vocab_size=model.vocab_size, **share)
    valid = data.make_valid_batches(
        config.data, vocab_size=model.vocab_size, max_batches=config.eval_batches, **share
    )

    # ---- optimizer and state ------------------------------------------------------------------
    trainable, _ = optim.partition(shapes, config.optim.freeze)
    optimizer, schedule = optim.make_optimizer(config.optim, config.steps, trainable)

    def init(weights):
        return step.init_state(weights, config.optim.freeze, optimizer)

    abstract = jax.eval_shape(init, shapes)
    display.console.print(parameter_table(shapes, mesh, config.optim))
    with jax.set_mesh(mesh):
        if checkpoints.latest is not None:  # 1. this run's own newest checkpoint
            state, note = checkpoints.restore(abstract, train, mesh, config.optim.freeze)
            display.say(f"Continuing from step {checkpoints.latest} of {config.steps}. {note}")
        else:
            if config.init_from:  # 2. a model
                loaded = io.load(config.init_from, dtype="float32", mesh=mesh)
                weights = params.split(loaded)[1]
                display.say(f"Starting from the weights in {config.init_from}.")
            else:  # 3. random weights
                weights = step.random_params(model, mesh, config.seed)
            where = sharding.shardings(abstract, mesh)
            state = jax.jit(init, out_shardings=where, donate_argnums=0)(weights)
    how = {"dtype": dtype, "accumulation": config.accumulation, "z_loss": config.z_loss}
    if config.distill is None:
        train_step = step.make_train_step(graphdef, optimizer, schedule, abstract, mesh, **how)
        eval_step = step.make_eval_step(graphdef, shapes, mesh, dtype=dtype)
    else:
        teacher = distill.load_teacher(config.distill.teacher, model.dtype, mesh)
        display.say(f"Learning from {config.distill.teacher}.")
        train_step, eval_step = distill.make_steps(
            config.distill, graphdef, teacher, optimizer, schedule, abstract, mesh, **how
        )

    # ---- tokenizer and text samples -----------------------------------------------------------
    if jax.process_index() == 0:
        checkpoints.save_tokenizer(config.data.tokenizer)
    sample = None
    if config.sample_prompts and jax.process_count() == 1:
        sample = TextSampler(
            graphdef, state.all_params(), data.load_tokenizer(config.data.tokenizer),
            config.sample_prompts,
            tokens=config.sample_tokens, temperature=config.sample_temperature,
        )  # fmt: skip
    stack = ExitStack()
    stack.enter_context(closing(checkpoints))
    return Run(config, workdir, model, mesh, state, train_step, eval_step, train, valid,
               checkpoints, sample, stack, flops)  # fmt: skip


def check_finite(n, values):
    """Ends a run whose weights are no numbers any more, before it saves them."""
    for name in ("loss", "grad_norm"):
        if not math.isfinite(values[name]):
            raise FloatingPointError(f"{name} is {float(values[name])} at step {n}")


def loop(run: Run) -> bool:
    """Trains to the last step, or until it is asked to stop. Returns whether the last is done."""
    config, state, last, start = run.config, run.state, run.config.steps, int(run.state.step)
    writer = run.stack.enter_context(closing(metrics.MetricWriter(run.workdir, start)))
    trace = metrics.Profiler(run.workdir, config.profile_start, config.profile_steps)
    run.stack.enter_context(closing(trace))
    display = run.stack.enter_context(closing(Display(last, start)))
    stop = run.stack.enter_context(closing(StopRequest()))
    batch_tokens = config.data.batch_size * config.data.seq_len
    speed = metrics.Throughput(run.flops_per_token, metrics.peak_flops())

    def evaluate(n):
        values = step.evaluate(run.eval_step, state.all_params(), run.valid, run.mesh)
        writer.write(n, "valid", values)
        loss = values["loss"]
        perplexity = math.exp(min(loss, 700))  # beyond it exp overflows
        text = f"step {n}: validation loss {loss:.4f}, perplexity {perplexity:.2f}"
        text += f", KL to the teacher {values['kl']:.4f}" if "kl" in values else ""
        display.say(text)

    def show_samples(n):
        assert run.sample is not None
        for text in run.sample(state.all_params(), seed=n):
            writer.write(n, "sample", {"text": text})
            display.say(f"step {n}: {text}")

    if start == 0 and run.valid:
        evaluate(0)
    speed.start()
    recorded, stopping = start, False
    for n in range(start + 1, last + 1):
        trace.before(n, state)
        state, values = run.train_step(state, sharding.put_batch(next(run.train), run.mesh))
        trace.after(n, state)
        display.step(n)
        stopping = stop.at(n)

        def due(every, n=n):
            return n == last or (every > 0 and n % every == 0)

        if due(config.log_every) or stopping or n == start + 1:
            record = {name: float(value) for name, value in values.items()}
            record |= speed.lap(n - recorded, (n - recorded) * batch_tokens)
            record |= metrics.memory_bytes()
            recorded = n
            writer.write(n, "train", record)
            display.train(n, record)
            check_finite(n, values)
        evaluates = due(config.eval_every) and bool(run.valid)
        samples = due(config.sample_every) and run.sample is not None
        saves = due(config.checkpoint_every) or stopping
        if evaluates or samples or saves:
            check_finite(n, values)  # waits for the step, whose time is not to count as a pause
        clock = time.perf_counter()
        if evaluates:
            evaluate(n)
        if samples:
            show_samples(n)
        if saves:
            run.checkpoints.save(n, state, run.train, run.model, config.to_dict())
        speed.pause(time.perf_counter() - clock)
        if stopping:
            display.say(f"{stop.name or 'Asked to stop'}: saving step {n}.")
            break
    run.stopped = stopping or bool(stop.name)  # the last evaluation comes after `stop.at`
    return recorded >= last
