"""Distillation: values against plain formulas, what trains, and one device against eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import random_batch, run_compiled

from jet_jax import distill, io, optim, params, sharding, step
from jet_jax.config import ModelConfig
from jet_jax.distill import DistillConfig, Teacher
from jet_jax.layer_errors import forced_errors
from jet_jax.mixers.context import Context
from jet_jax.models.lm import HybridLM

MIXERS = {
    "attn": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
    "swa": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window_size": 5},
    "gdn": {"num_heads": 2, "head_dim": 8},
    "rwkv7": {"head_dim": 8, "gate_low_rank_dim": 4},
}
FROZEN = (r"\.mlp\.", r"\.post_attention_layernorm\.", r"embed_tokens", r"^norm\.")
OPTIM = optim.OptimConfig(lr=1e-2, schedule="constant", eps=1e-3, freeze=FROZEN)


def model(*kinds, seed=0, **changes):
    config = ModelConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        layer_types=kinds,
        mixers={kind: MIXERS[kind] for kind in kinds},
        initializer_range=0.3,
        dtype="float32",
        **changes,
    )
    made = HybridLM(config, rngs=nnx.Rngs(seed))
    if "rwkv7" in kinds:  # its output projection starts at zero
        graphdef, weights = params.split(made)
        keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(weights)))
        keys = jax.tree.unflatten(jax.tree.structure(weights), list(keys))
        noise = jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), weights, keys)
        made = nnx.merge(graphdef, noise)
    return made


@pytest.fixture(scope="module")
def teacher():
    return model("attn", "attn", "attn", seed=1)


@pytest.fixture(scope="module")
def student():
    return model("rwkv7", "rwkv7", "swa", seed=2)


@pytest.fixture(scope="module")
def pair():
    """A smaller student and teacher, for what has to compile often."""
    return model("gdn", "attn", seed=2), model("attn", "attn", seed=1)


@pytest.fixture(scope="module")
def batch():
    return random_batch(0, 8, 16, vocab=61)


@pytest.fixture(scope="module")
def single():
    return sharding.make_mesh(devices=jax.devices()[:1])


@partial(jax.jit, static_argnums=0)
def forward(graphdef, weights, batch):
    where = {name: batch[name] for name in ("segment_ids", "positions")}
    collect = ("hidden_states", "mixer_outputs")
    out = nnx.merge(graphdef, weights).forward(batch["tokens"], **where, collect=collect)
    return out.logits, out.features


def outputs(language_model, batch):
    logits, features = jax.device_get(forward(*params.split(language_model), batch))
    return np.asarray(logits, np.float64), features


def loss(config, student, teacher, batch):
    """Sums, and the gradient by weight's path."""
    graphdef, weights = params.split(student)

    @jax.jit
    def run(weights, batch):
        def total(weights):
            return distill.distill_loss(config, nnx.merge(graphdef, weights), teacher, batch)

        return jax.grad(total, has_aux=True)(weights)

    grads, sums = run_compiled(run, weights, batch)
    return jax.device_get(sums), params.flatten(jax.device_get(grads))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def plain_parts(student, teacher, batch):
    """The three parts of the loss in float64, over the real tokens alone."""
    (logits, mine), (other, theirs) = outputs(student, batch), outputs(teacher, batch)
    real = batch["loss_mask"] > 0
    errors = []
    for y, target in zip(mine["mixer_outputs"], theirs["mixer_outputs"], strict=True):
        y, target = np.asarray(y, np.float64)[real], np.asarray(target, np.float64)[real]
        errors.append(((y - target) ** 2).mean() / target.var())
    log_q, log_p = log_softmax(logits)[real], log_softmax(other)[real]
    return {
        "mse": np.mean(errors),
        "kl": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "ce": -log_q[np.arange(len(log_q)), batch["targets"][real]].mean(),
    }


def test_values_and_gradient_are_those_of_the_plain_formulas(student, teacher, batch):
    config = DistillConfig("t", mse=0.5, kl=2.0, ce=0.3)
    sums, grads = loss(config, student, teacher, batch)
    want, tokens = plain_parts(student, teacher, batch), batch["loss_mask"].sum()
    assert sums["tokens"] == tokens
    for name, value in want.items():
        np.testing.assert_allclose(sums[name] / tokens, value, rtol=2e-5, err_msg=name)

    def total(parts):
        return sum(getattr(config, name) * part for name, part in parts.items())

    np.testing.assert_allclose(sums["loss"] / tokens, total(want), rtol=2e-5)
    graphdef, weights = params.split(student)
    flat = params.flatten(weights)
    rng = np.random.default_rng(3)

    def value(direction, size):
        moved = {name: x + size * direction[name] for name, x in flat.items()}
        moved = nnx.merge(graphdef, params.unflatten(moved))
        return total(plain_parts(moved, teacher, batch))

    # By group, so that large gradients do not hide small ones.
    for group in ("layers.0.mixer", "layers.1.mixer", "layers.2", "embed_tokens"):
        direction = {
            n: np.float32(rng.choice([-1.0, 1.0], x.shape) * (group in n)) for n, x in flat.items()
        }
        numeric = (value(direction, 1e-3) - value(direction, -1e-3)) / 2e-3
        exact = sum((grads[n] * d).sum() for n, d in direction.items()) / tokens
        np.testing.assert_allclose(exact, numeric, rtol=2e-2, atol=1e-3, err_msg=group)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(teacher, batch):
    sums, grads = loss(DistillConfig("t"), teacher, teacher, batch)
    assert sums["mse"] == 0 and abs(sums["kl"]) < 1e-4
    assert max(np.abs(g).max() for g in grads.values()) < 1e-4


def test_forced_mixers_read_the_teachers_input_and_learn_alone(student, teacher, batch):
    """The first layers are RWKV-7 and the last a window, in a teacher whose last is one too."""
    guide = model("attn", "attn", "swa", seed=1)
    config = DistillConfig("t", mse=3.0, kl=0.0, forced=True)
    sums, grads = loss(config, student, guide, batch)
    features = outputs(guide, batch)[1]
    rows = jax.tree.map(jnp.asarray, batch)
    real, shared, errors = batch["loss_mask"] > 0, {}, []
    for i in range(2):
        ctx = Context(rows["segment_ids"], rows["positions"], None, shared)
        h = guide.layers[i].input_layernorm(jnp.asarray(features["hidden_states"][i]))
        mixer, weights = params.split(student.layers[i].mixer)
        mix = jax.jit(lambda w, h, ctx, mixer=mixer: nnx.merge(mixer, w)(h, ctx))
        y, _, shared = run_compiled(mix, weights, h, ctx)
        target = np.asarray(features["mixer_outputs"][i], np.float64)[real]
        errors.append(((np.asarray(y, np.float64)[real] - target) ** 2).mean() / target.var())
    tokens = batch["loss_mask"].sum()
    np.testing.assert_allclose(sums["mse"] / tokens, np.mean(errors), rtol=2e-5)
    np.testing.assert_allclose(sums["loss"] / tokens, 3 * np.mean(errors), rtol=2e-5)
    moved = {name for name, g in grads.items() if np.abs(g).max() > 0}
    own = {name for name in grads if name.startswith(("layers.0.mixer", "layers.1.mixer"))}
    assert moved == own


def test_forced_layers_do_not_meet(teacher, batch):
    """Another first layer changes nothing but its own error; runs of equal layers are scanned."""
    guide = Teacher.of(teacher)
    reader = nnx.merge(guide.graphdef, guide.params)
    students = [model("gdn", "gdn", "gdn", seed=seed) for seed in (4, 5)]
    graphdef, weights = params.split(students[0])
    other = {
        **weights,
        "layers": {**weights["layers"], 0: params.split(students[1])[1]["layers"][0]},
    }

    @jax.jit
    def run(weights, batch):
        def total(weights):
            errors = forced_errors(nnx.merge(graphdef, weights), reader, batch)
            return errors.sum(), errors

        return jax.grad(total, has_aux=True)(weights)

    (grads, errors), (other_grads, other_errors) = (
        jax.device_get(run_compiled(run, w, batch)) for w in (weights, other)
    )
    assert errors.shape == (3,) and abs(errors[0] - other_errors[0]) > 1e-3
    some = jax.jit(partial(forced_errors, students[0], reader, counted=(0, 2)))(batch)
    np.testing.assert_allclose(some, errors[[0, 2]], rtol=1e-5)
    np.testing.assert_allclose(errors[1:], other_errors[1:], rtol=1e-6)
    for name, g in params.flatten(grads["layers"][2]).items():
        np.testing.assert_allclose(
            g, params.flatten(other_grads["layers"][2])[name], atol=1e-7, err_msg=name
        )


def run_step(config, pair, mesh, batch, **options):
    """The state and the metrics after one step."""
    student, teacher = pair
    graphdef, weights = params.split(student)
    weights = jax.tree.map(jnp.copy, weights)  # the step donates its state
    trainable, _ = optim.partition(weights, OPTIM.freeze)
    tx, schedule = optim.make_optimizer(OPTIM, 10, trainable)
    guide = Teacher.of(teacher)
    with jax.set_mesh(mesh):
        state = step.init_state(weights, OPTIM.freeze, tx)
        state = jax.device_put(state, sharding.shardings(state, mesh))
        guide_params = jax.device_put(guide.params, sharding.shardings(guide.params, mesh))
        options = {"dtype": jnp.float32} | options
        train_step = distill.make_distill_step(
            config, graphdef, guide, tx, schedule, state, mesh, **options
        )
        rows = sharding.put_batch(batch, mesh)
        state, metrics = run_compiled(train_step, state, rows, guide_params)
        kept = jax.device_get(guide_params)  # fails if the step took their buffers
    jax.tree.map(np.testing.assert_array_equal, kept, jax.device_get(guide.params))
    return jax.device_get((state, metrics))


@pytest.fixture(scope="module")
def expected(pair, batch, single):
    config = DistillConfig("t", kl=2.0, ce=0.5, normalise=False)
    return run_step(config, pair, single, batch)


def assert_same(got, want):
    for name, value in want[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=2e-5, err_msg=name)
    flat = params.flatten(got[0].all_params())
    for name, value in params.flatten(want[0].all_params()).items():
        np.testing.assert_allclose(flat[name], value, atol=2e-5, err_msg=name)


def test_eight_devices_and_two_parts_equal_one(pair, batch, expected):
    config = DistillConfig("t", kl=2.0, ce=0.5, normalise=False)
    mesh = sharding.make_mesh(2, 2, 2)
    assert_same(run_step(config, pair, mesh, batch, accumulation=2), expected)
    state, metrics = expected
    names = {"loss", "mse", "kl", "ce", "accuracy", "tokens", "grad_norm", "lr"}
    assert metrics.keys() == names
    before = params.flatten(params.split(pair[0])[1])
    for name, value in params.flatten(state.all_params()).items():
        still = any(part in name for part in ("mlp", "post_attention", "embed_tokens"))
        assert np.array_equal(value, before[name]) == (still or name == "norm.scale"), name


def test_forced_step_on_eight_devices_equals_one(pair, batch, single):
    config = DistillConfig("t", kl=0.0, forced=True)
    one = run_step(config, pair, single, batch)
    assert one[1].keys() == {"loss", "mse", "tokens", "grad_norm", "lr"}
    assert_same(run_step(config, pair, sharding.make_mesh(2, 2, 2), batch), one)


def test_bfloat16_compute_keeps_float32_weights(pair, batch, single, expected):
    student = HybridLM(pair[0].config.replace(dtype="bfloat16"), rngs=nnx.Rngs(2))
    teacher = HybridLM(pair[1].config.replace(dtype="bfloat16"), rngs=nnx.Rngs(1))
    config = DistillConfig("t", kl=2.0, ce=0.5, normalise=False)
    state, metrics = run_step(config, (student, teacher), single, batch, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.params))
    cast = params.flatten(Teacher.of(teacher).params)
    assert cast["layers.0.mixer.q_proj.kernel"].dtype == jnp.bfloat16
    for name in ("loss", "mse", "kl", "ce"):
        np.testing.assert_allclose(metrics[name], expected[1][name], rtol=5e-2, err_msg=name)


def test_evaluation_reports_next_token_loss_and_kl(student, teacher, batch, single):
    guide = Teacher.of(teacher)
    graphdef, weights = params.split(student)
    with jax.set_mesh(single):
        weights = jax.device_put(weights, sharding.shardings(weights, single))
        guide_params = jax.device_put(guide.params, sharding.shardings(guide.params, single))
        beside = distill.make_distill_eval_step(graphdef, weights, guide, single, dtype=jnp.float32)
        values = step.evaluate(lambda p, b: beside(p, b, guide_params), weights, [batch], single)
    want = plain_parts(student, teacher, batch)
    np.testing.assert_allclose(values["kl"], want["kl"], rtol=2e-5)
    np.testing.assert_allclose(values["loss"], want["ce"], rtol=2e-5)
    assert values.keys() == {"loss", "kl", "accuracy", "tokens"}


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="distill.teacher is missing"):
        DistillConfig("")
    with pytest.raises(ValueError, match="distill.kl=-1.0 must be 0 or positive"):
        DistillConfig("t", kl=-1.0)
    with pytest.raises(ValueError, match="one of mse, kl and ce must be positive"):
        DistillConfig("t", mse=0.0, kl=0.0)
    with pytest.raises(ValueError, match="set kl and ce to 0 "):
        DistillConfig("t", forced=True)


def test_teachers_that_do_not_fit(teacher, tmp_path):
    io.save(teacher, tmp_path / "teacher")
    config = DistillConfig(str(tmp_path / "teacher"))
    other = model("gdn", "gdn").config
    assert distill.check_teacher(config, model("gdn", "attn", "gdn").config) == teacher.config
    with pytest.raises(ValueError, match="has num_layers=3, the student 2"):
        distill.check_teacher(config, other)
    kl_only = DistillConfig(config.teacher, mse=0.0)
    assert distill.check_teacher(kl_only, other).num_layers == 3
    with pytest.raises(ValueError, match="has vocab_size=61, the student 62"):
        distill.check_teacher(kl_only, other.replace(vocab_size=62))
    with pytest.raises(ValueError, match="so that no layer would train"):
        forced = DistillConfig(config.teacher, kl=0.0, forced=True)
        distill.check_teacher(forced, teacher.config)
    for place, message in (("none", "does not exist"), ("", "holds no model")):
        with pytest.raises(ValueError, match=f"distill.teacher: .*{message}"):
            distill.check_teacher(DistillConfig(str(tmp_path / place)), other)


def test_flops_count_what_runs():
    kinds = model("gdn", "attn").config, model("attn", "attn").config
    student, teacher = (c.flops_per_token(8) for c in kinds)
    head = 2 * 61 * 16

    def count(**parts):
        return distill.flops_per_token(DistillConfig("t", **parts), *kinds, 8)

    assert count() == 3 * student + teacher
    assert count(mse=1.0, kl=0.0, ce=1.0) == 3 * student + teacher - head
    assert count(mse=0.0, kl=0.0, ce=1.0) == 3 * student
    assert count(kl=0.0) == 3 * (student - head) + teacher - head
    options = kinds[0].options("gdn")
    mixer = 2 * options.matmul_params(16) + options.mixing_flops(8, 16)
    assert count(kl=0.0, forced=True) == 3 * mixer + teacher - head
