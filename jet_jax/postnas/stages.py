"""The stages of a search, each from what the stages before it left in the workdir.

    align       linear paths learn their layer's attention, teacher-forced
    supernet    sampled paths on their own stream
    placement   which layers keep their attention
    blocks, ablations, shapes    comparisons of layers in that placement
    hybrid      the model of that placement, for train.py and every command
    distill, finetune            its final training
    evaluate    all of these models beside the teacher, on items that decided nothing
    report      report.html

A stage that is done has left STAGE.json; it is not run again. Comparisons and final training are
run where the config has settings for them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jet_jax import checkpoint, io, metrics, train_run
from jet_jax.params import digest
from jet_jax.postnas import figures, final_evaluation, report, training
from jet_jax.postnas.comparison import compare
from jet_jax.postnas.final_hybrid import chosen, converted
from jet_jax.postnas.json_files import plain, read_json, write_json
from jet_jax.postnas.path_optim import make_path_optimizer
from jet_jax.postnas.paths import LINEAR
from jet_jax.postnas.placement import Placement
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_changes import made_of
from jet_jax.postnas.search_config import COMPARED, TRAINED, SearchConfig
from jet_jax.postnas.search_report import write_report
from jet_jax.postnas.shape_comparison import compare_shapes
from jet_jax.postnas.stage_training import Loop, Stopped
from jet_jax.postnas.supernet import shardings
from jet_jax.progress import Display
from jet_jax.train_config import TrainConfig


def run_align(search: Search) -> dict[str, Any]:
    """Teacher-forced alignment of every layer's linear path."""
    settings = search.config.align
    if not settings.steps:
        return {"steps": 0}
    trained = {"linear": search.start_weights()}
    optimizer = make_path_optimizer(settings.optim, settings.steps, trained, {})
    state = _state(search, trained, optimizer)
    step = training.make_align_step(
        search.net, optimizer, state, search.mesh, accumulation=settings.accumulation
    )
    return _train(search, "align", 0, settings.steps, state, step)


def run_supernet(search: Search) -> dict[str, Any]:
    """Training on sampled paths."""
    settings = search.config.supernet
    if not settings.steps:
        return {"steps": 0}
    trained = search.trained("align")
    if settings.train_full:
        attention = search.teacher_weights["layers"]["mixer"]
        trained["full"] = jax.tree.map(lambda x: jnp.array(x, jnp.float32), attention)
    optimizer = make_path_optimizer(
        settings.optim, settings.steps, trained, {"full": settings.full_lr}
    )
    state = _state(search, trained, optimizer)
    step = training.make_path_step(
        search.net, optimizer, state, search.mesh, law=settings.law, loss=settings.loss,
        seed=search.config.seed, accumulation=settings.accumulation, remat=settings.remat,
    )  # fmt: skip
    return _train(search, "supernet", 1, settings.steps, state, step)


def _state(search: Search, trained: dict[str, Any], optimizer: Any) -> Any:
    params = {**trained, "teacher": search.teacher_weights}
    state = training.init_state(params, optimizer)
    return jax.device_put(state, shardings(state, search.mesh))


def _train(
    search: Search, name: str, number: int, steps: int, state: Any, step: Any
) -> dict[str, Any]:
    c = search.config
    forward = search.teacher.flops_per_token(c.data.seq_len)
    loop = Loop(
        name, search.workdir / name, steps, search.mesh, c.data.batch_size * c.data.seq_len,
        # The teacher and, on sampled paths, the student and the gradients of its activations.
        forward * (2 if name == "align" else 3), c.log_every, c.checkpoint_every,
    )  # fmt: skip
    with closing(search.batches(number)) as iterator:
        loop.run(state, step, iterator)
    records = metrics.read_records(search.workdir / name, "train")
    names = ("loss", "mse", "kl", "tokens_per_second")
    ends = {
        end: {k: r[k] for k in names if k in r}
        for end, r in (("first", records[0]), ("last", records[-1]))
    }
    return {"steps": steps, "tokens": steps * loop.batch_tokens, **ends}


def run_placement(search: Search) -> dict[str, Any]:
    """Scores placements through the supernet and decides."""
    folder = search.workdir / "placement"
    folder.mkdir(exist_ok=True)
    params = search.params()
    scorer = search.scorer(params)
    known = folder / "scores.jsonl"
    if known.exists():
        scorer.load(known)
    with closing(Display(0)) as display:

        def advance(done: int, total: int) -> None:
            display.count("scoring paths", done, total)
            scorer.save(known)

        scorer.advance = advance
        placement = Placement(search.config.placement, scorer)
        decision = placement.run()
    table = placement.table()
    write_json(folder / "table.json", table)
    head = ["kept layers", "path", *decision["objectives"]]
    rows = [[_kept(r["path"]), "".join(map(str, r["path"])), *list(r.values())[1:]] for r in table]
    (folder / "table.md").write_text(report.markdown(head, rows), encoding="utf-8")
    better = {o.name: o.more_is_better for o in scorer.objectives}
    kept = [i for i, kind in enumerate(decision["layer_types"]) if kind == "attn"]
    figures.heat_map(decision["heat_map"], better, kept, folder / "heat_map.png")
    if decision["curve"]:
        judge = scorer.objective(search.config.placement.full_by)
        figures.curve(decision["curve"], f"{judge.name}: {judge.figure}", folder / "curve.png")
    return decision


def run_comparison(search: Search, name: str) -> dict[str, Any]:
    """Compares layers in the chosen placement: "blocks", "ablations" or "shapes"."""
    settings = getattr(search.config, name)
    run = compare_shapes if name == "shapes" else compare
    return run(settings, search.workdir / name, search.comparison(settings))


def run_hybrid(search: Search) -> dict[str, Any]:
    """Saves the chosen hybrid as a model directory."""
    path = search.result("placement")["path"]
    if search.config.final:
        config, weights, tokens = converted(search)
        state = f"aligned on {tokens:,} tokens" if tokens else "untrained"
    else:
        config = search.net.hybrid(path)
        weights = search.net.extract(search.params(), path)
        state = "as the supernet trained them"
    target = search.workdir / "model"
    tokenizer = io.tokenizer_dir(search.config.teacher)
    checkpoint.save_model(target, config, weights, tokenizer, overwrite=target.exists())
    full = search.teacher
    context = full.max_position_embeddings
    return {
        "model": str(target),
        "layer_types": list(config.layer_types),
        "options": plain({kind: dataclasses.asdict(x) for kind, x in config.mixers}),
        "chosen": chosen(search)[0] if search.config.final else None,
        "new_layers": state,
        "digest": digest(weights["layers"][path.index(LINEAR)]) if LINEAR in path else None,
        "parameters": config.param_count(),
        "teacher_parameters": full.param_count(),
        "context": context,
        "cache_bytes": config.cache_bytes(context),
        "teacher_cache_bytes": full.cache_bytes(context),
    }


def run_training(search: Search, name: str) -> dict[str, Any]:
    """Final training by distillation: "distill" from the hybrid, "finetune" from what that gave."""
    is_second = name == "finetune" and search.config.distill is not None
    before = search.model("distill" if is_second else "hybrid")
    config = TrainConfig.from_dict(search.config.training(name, before))
    folder = search.workdir / name
    training = train_run.prepare(config, folder)
    with jax.set_mesh(training.mesh), training.stack:
        train_run.loop(training)
        if training.stopped:  # also in the last step: nothing is to come after it
            raise Stopped(f"{name}: saved on request")
    valid = metrics.read_records(folder, "valid")
    return {
        "model": str(folder),
        "steps": config.steps,
        "tokens": config.steps * config.data.batch_size * config.data.seq_len,
        "first": valid[0] if valid else None,
        "last": valid[-1] if valid else None,
    }


def run_evaluation(search: Search) -> dict[str, Any]:
    """Scores and times what the search has made."""
    evaluation = final_evaluation.evaluate(search)
    text = final_evaluation.table(evaluation)
    (search.workdir / "evaluation.md").write_text(text, encoding="utf-8")
    return evaluation


def run_report(search: Search) -> dict[str, Any]:
    """Writes report.html from what the other stages left."""
    return {"report": str(write_report(search.workdir, search.config))}


RUN: dict[str, Callable[[Search], dict[str, Any]]] = {
    "align": run_align,
    "supernet": run_supernet,
    "placement": run_placement,
    **{name: partial(run_comparison, name=name) for name in COMPARED},
    "hybrid": run_hybrid,
    **{name: partial(run_training, name=name) for name in TRAINED},
    "evaluate": run_evaluation,
    "report": run_report,
}


def is_asked(config: SearchConfig, stage: str) -> bool:
    """Whether a search of these settings has that stage."""
    return stage not in (*COMPARED, *TRAINED) or getattr(config, stage) is not None


def check_gates(search: Search) -> None:
    """Sees whether the teacher passes the objectives' gates, before anything is trained.

    Raises:
      ValueError: it does not pass one.
    """
    done = search.workdir / "gates.json"
    if done.exists() or all(objective.gate is None for objective in search.objectives):
        return
    shapes = jax.eval_shape(search.net.random_linear, jax.random.key(0))
    unused = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    params = {"linear": unused, "teacher": search.teacher_weights}
    placed = jax.device_put(params, shardings(params, search.mesh))
    write_json(done, search.scorer(placed).check_teacher())


def run(search: Search, stage: str) -> dict[str, Any]:
    """Runs a stage and notes that it is done; what was made of its result before is not any more.

    Raises:
      ValueError: the config has no such stage, the result of an earlier one is missing, or the
        stage's checkpoints grew from other results.
    """
    if not is_asked(search.config, stage):
        raise ValueError(f"the config has no settings for the stage {stage!r}; add config.{stage}")
    _check_inputs(search, stage)
    for later in made_of(search.config, stage):
        (search.workdir / f"{later}.json").unlink(missing_ok=True)
    if stage in ("align", "supernet"):  # whose weights the known scores are of
        (search.workdir / "placement" / "scores.jsonl").unlink(missing_ok=True)
    result = RUN[stage](search)
    if jax.process_index() == 0:
        write_json(search.workdir / f"{stage}.json", result)
    return result


# Stages that go on from their own checkpoints, and the results that these grew from.
GROWN_FROM = {
    "supernet": ("align",),
    "distill": ("align", "supernet", "hybrid"),
    "finetune": ("align", "supernet", "hybrid", "distill"),
}


def _check_inputs(search: Search, stage: str) -> None:
    """Refuses to go on from checkpoints that grew from other results than there are now."""
    before = "distill" if stage == "finetune" and search.config.distill is not None else "hybrid"
    if stage in TRAINED:
        search.require(before)
    mine = {}
    for name in GROWN_FROM.get(stage, ()):
        path = search.workdir / f"{name}.json"
        if path.exists():
            mine[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    folder = search.workdir / stage
    there = read_json(folder / "inputs.json")
    if there is not None and there != mine:
        changed = sorted(x for x in {*there, *mine} if there.get(x) != mine.get(x))
        raise ValueError(
            f"what is in {folder} grew from other results of {', '.join(changed)}; to train it "
            f"anew delete {folder}"
        )
    if mine:
        write_json(folder / "inputs.json", mine)


def _kept(path: list[int]) -> str:
    return ", ".join(f"{i}" + "w" * (x == 2) for i, x in enumerate(path) if x != 1) or "none"
