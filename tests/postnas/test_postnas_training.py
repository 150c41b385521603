"""Alignment and sampled paths: exact where the answer is known, and only what is active moves."""

import jax
import jax.extend
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import tiny

from jet_jax import optim
from jet_jax.postnas import training
from jet_jax.postnas.path_optim import make_path_optimizer
from jet_jax.postnas.paths import LINEAR, PathLaw
from jet_jax.postnas.training import PathLoss
from jet_jax.sharding import make_mesh, put_batch

TEACHER = np.zeros(4, np.int32)
SEED = 5  # whose first path has both kinds
LAW = PathLaw("bernoulli")
LOSS = PathLoss(mse=1.0, kl=1.0, normalise=False)
CONFIG = optim.OptimConfig(lr=3e-3, schedule="constant", weight_decay=0.1)


def batch(seed=0, rows=8):
    return tiny.random_batch(seed, rows, 16, vocab=61)


def setup(full=False):
    """Supernet, optimizer and the state before the first step."""
    params = dict(nets.params())
    if full:
        params["full"] = params["teacher"]["layers"]["mixer"]
    trainable = {k: v for k, v in params.items() if k != "teacher"}
    optimizer = make_path_optimizer(CONFIG, 100, trainable, {"full": 0.1})
    return nets.supernet(), optimizer, training.init_state(params, optimizer)


def copied(state):
    return jax.tree.map(jnp.array, state)  # steps donate their state


@pytest.fixture(scope="module")
def path_step():
    """The state before the first step, on one device, and the step."""
    net, optimizer, state = setup(full=True)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    state = jax.device_put(state, training.supernet.shardings(state, mesh))
    step = training.make_path_step(net, optimizer, state, mesh, law=LAW, loss=LOSS, seed=SEED)
    return state, step, mesh


def run(step, state, mesh, batches):
    state, out = copied(state), []
    with jax.set_mesh(mesh):
        for one in batches:
            state, metrics = step(state, put_batch(one, mesh))
            out.append(jax.tree.map(np.asarray, metrics))
    return state, out


@pytest.fixture(scope="module")
def loss_of():
    """The loss of a path and its parts, on one batch."""
    given = {k: jnp.asarray(v) for k, v in batch().items()}
    net = nets.supernet()
    return jax.jit(lambda params, path: training.path_loss(net, params, path, given, PathLoss()))


def test_the_teachers_own_path_has_no_loss(loss_of):
    total, parts = loss_of(nets.params(), TEACHER)
    assert total == 0 and parts["mse"] == 0 and parts["kl"] == 0
    total, parts = loss_of(nets.params(), np.full(4, LINEAR, np.int32))
    assert parts["mse"] > 0.5 and parts["kl"] > 0.01


def test_what_a_path_leaves_out_neither_moves_nor_decays(path_step):
    before, step, mesh = path_step
    after, metrics = run(step, before, mesh, [batch()])
    path = metrics[0]["path"]
    assert 0 < (path == LINEAR).sum() < 4  # both kinds occur
    for group, active in (("linear", path == LINEAR), ("full", path != LINEAR)):
        pairs = zip(jax.tree.leaves(before.params[group]), jax.tree.leaves(after.params[group]),
                    strict=True)  # fmt: skip
        moved = np.any([np.any(np.asarray(a != b).reshape(4, -1), 1) for a, b in pairs], axis=0)
        assert np.array_equal(moved, active)
        assert np.array_equal(after.opt_state[group][0].count, active.astype(int))
        mu = jax.tree.leaves(after.opt_state[group][0].mu)
        assert all(np.all(np.asarray(m)[~active] == 0) for m in mu)


def test_losses_of_sampled_paths_fall_and_a_resume_repeats_them(path_step, loss_of):
    before, step, mesh = path_step
    batches = [batch(0)] * 60
    after, metrics = run(step, before, mesh, batches)
    assert len({m["path"].tobytes() for m in metrics}) > 4 and step.__wrapped__._cache_size() == 1
    for path in ([1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 0]):
        path = np.array(path, np.int32)
        first, last = (
            float(loss_of(jax.device_get({**x.frozen, "linear": x.params["linear"]}), path)[0])
            for x in (before, after)
        )
        assert last < 0.9 * first, (path, first, last)
    half, _ = run(step, before, mesh, batches[:30])
    _, rest = run(step, half, mesh, batches[30:])
    assert [float(m["loss"]) for m in rest] == [float(m["loss"]) for m in metrics[30:]]


@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)])
def test_eight_devices_equal_one(path_step, sizes):
    """The second mesh with two parts of a batch, which leaves one row a device."""
    before, step, mesh = path_step
    net, optimizer, state = setup(full=True)
    many = make_mesh(*sizes)
    with jax.set_mesh(many):
        placed = jax.device_put(copied(state), training.supernet.shardings(state, many))
        split_step = training.make_path_step(
            net, optimizer, state, many, law=LAW, loss=LOSS, seed=SEED, accumulation=sizes[2]
        )
    batches = [batch(i) for i in range(2)]  # parts of a batch differ in their tokens
    assert len({(x["segment_ids"][i::2] != 0).sum() for x in batches for i in range(2)}) > 1
    _, expected = run(step, before, mesh, batches)
    _, got = run(split_step, placed, many, batches)
    # Adam's first step is a sign, which rounding may turn where a gradient is almost nothing.
    for a, b, tolerance in zip(got, expected, (1e-4, 0.05), strict=True):
        assert np.array_equal(a["path"], b["path"])
        for name in ("loss", "mse", "kl", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=tolerance), name


@pytest.mark.parametrize(("remat", "again"), [("mixer", 0), ("layer", 2)])
def test_a_step_multiplies_by_frozen_weights_no_more_than_it_must(remat, again):
    """Counts products by the MLP's (width 48) and the head's (61 tokens) weights."""
    net, params = nets.supernet(), nets.params()
    given = {k: jnp.asarray(v) for k, v in batch().items()}

    def loss(linear, path):
        return training.path_loss(net, params | {"linear": linear}, path, given, LOSS, remat)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params["linear"], TEACHER)
    shapes = [{*e.invars[0].aval.shape, *e.invars[1].aval.shape} for e in products(jaxpr.jaxpr)]
    # Teacher and student forward, then the gradients of activations; none of frozen weights.
    assert sum(48 in sizes for sizes in shapes) == 3 * 3 + again
    assert sum(61 in sizes for sizes in shapes) == 3


def products(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(sub)


def test_alignment_lowers_every_layers_error():
    net, optimizer, state = setup()
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(copied(state), training.supernet.shardings(state, mesh))
        step = training.make_align_step(net, optimizer, state, mesh)
    before = placed.frozen
    after, metrics = run(step, placed, mesh, [batch(i % 2) for i in range(40)])
    first, last = metrics[0]["errors"], metrics[-1]["errors"]
    assert first.shape == (4,) and np.all(last < 0.8 * first), (first, last)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after.frozen)
    assert all(jax.tree.leaves(same))


def test_an_alignment_in_parts_is_that_of_the_batch():
    """Rows are doubled, one of each pair to each part: the variance that errors are over is one."""
    twice = {name: np.repeat(x, 2, axis=0) for name, x in batch().items()}
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    found = []
    for parts in (1, 2):
        net, optimizer, state = setup()
        with jax.set_mesh(mesh):
            step = training.make_align_step(net, optimizer, state, mesh, accumulation=parts)
            found.append(jax.device_get(step(copied(state), jax.tree.map(jnp.asarray, twice))[1]))
    for name in ("loss", "errors", "grad_norm"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-4, err_msg=name)


def test_an_alignment_gradient_is_that_of_its_layers_error():
    net, params = nets.supernet(), nets.params()
    given = {k: jnp.asarray(v) for k, v in batch().items()}
    errors, grads = jax.jit(lambda p: training.align_errors(net, p, given))(params)
    alone, none = jax.jit(lambda p: training.align_errors(net, p, given, False))(params)
    assert none is None and np.allclose(errors, alone, rtol=1e-5)
    shift = jax.tree.map(lambda g: g / 50, grads)
    moved = {**params, "linear": jax.tree.map(lambda p, s: p - s, params["linear"], shift)}
    lower, _ = jax.jit(lambda p: training.align_errors(net, p, given, False))(moved)
    slope = jax.tree.map(lambda g: (g**2).reshape(4, -1).sum(1) / 50, grads)
    expected = sum(jax.tree.leaves(slope))
    assert np.allclose(errors - lower, expected, rtol=0.5) and np.all(lower < errors)
