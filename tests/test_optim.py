"""Schedules, groups, freezing and the AdamW update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jet_jax import optim
from jet_jax.optim import OptimConfig


def params():
    def layer(seed):
        rng = np.random.default_rng(seed)
        w = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)  # noqa: E731
        return {
            "input_layernorm": {"scale": w(4)},
            "mixer": {
                "q_proj": {"kernel": w(4, 4), "bias": w(4)},
                "A_log": w(2),
                "dt_bias": w(2),
                "generator": {"w1": w(4, 2), "b2": w(4, 8)},
            },
        }

    return {
        "embed_tokens": {"embedding": jnp.ones((6, 4))},
        "layers": {0: layer(0), 1: layer(1)},
    }


def curve(config, steps):
    schedule = optim.make_schedule(config, steps)
    return np.array([schedule(i) for i in range(steps)])


def test_cosine_warms_up_peaks_and_ends_at_the_ratio():
    lr = curve(OptimConfig(lr=1.0, warmup_steps=10, min_lr_ratio=0.1), 110)
    np.testing.assert_allclose(lr[:10], np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(lr[10], 1.0, rtol=1e-6)
    np.testing.assert_allclose(lr[60], 0.55, rtol=1e-6)  # half way between 1 and 0.1
    assert np.all(np.diff(lr[10:]) < 0) and 0.1 < lr[-1] < 0.101


def test_wsd_holds_the_peak_then_falls_linearly():
    config = OptimConfig(lr=2.0, schedule="wsd", warmup_steps=4, decay_steps=20, min_lr_ratio=0.0)
    lr = curve(config, 100)
    np.testing.assert_allclose(lr[4:81], 2.0, rtol=1e-6)
    np.testing.assert_allclose(lr[80:], 2.0 * (1 - np.arange(20) / 20), rtol=1e-6)
    assert float(optim.make_schedule(config, 100)(100)) == 0.0


def test_wsd_decays_over_a_tenth_by_default():
    lr = curve(OptimConfig(lr=1.0, schedule="wsd", min_lr_ratio=0.5), 100)
    assert lr[90] == 1.0 and lr[91] < 1.0
    assert np.all(curve(OptimConfig(lr=1.0, schedule="constant"), 5) == 1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(schedule="linear"), "cosine, wsd, constant"),
        (lambda: OptimConfig(lr=-1.0), "optim.lr=-1.0 must not be negative"),
        (
            lambda: optim.make_schedule(
                OptimConfig(schedule="wsd", warmup_steps=6, decay_steps=6), 10
            ),
            "warmup_steps=6 and decay_steps=6 do not fit in steps=10",
        ),
        (lambda: optim.partition(params(), ["mlp"]), "'mlp' matches no parameter"),
        (lambda: optim.partition(params(), ["("]), "no regular expression"),
        (lambda: optim.partition(params(), ["."]), "freezes every parameter"),
        (
            lambda: optim.lr_multipliers(params(), OptimConfig(lr_multipliers=(("qproj", 2.0),))),
            "optim.lr_multipliers: 'qproj' matches no parameter; paths look like embed_tokens",
        ),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


def test_partition_and_combine():
    full = params()
    trainable, frozen = optim.partition(full, [r"^layers\.0\.", "embed"])
    assert set(trainable) == {"layers"} and set(trainable["layers"]) == {1}
    assert set(frozen["layers"]) == {0} and "embed_tokens" in frozen
    joined = optim.combine(trainable, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(full)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, joined, full))
    everything, nothing = optim.partition(full, [])
    assert nothing == {} and jax.tree.structure(everything) == jax.tree.structure(full)


def test_frozen_parameters_have_no_moments():
    trainable, _ = optim.partition(params(), ["mixer"])
    tx, _ = optim.make_optimizer(OptimConfig(), 10, trainable)
    moments = jax.tree_util.tree_leaves_with_path(tx.init(trainable))
    names = [jax.tree_util.keystr(path) for path, _ in moments]
    assert names and not any("mixer" in name for name in names)


def test_decay_leaves_norms_biases_and_gates_alone():
    config = OptimConfig()
    mask = optim.decay_mask(params(), config)
    layer = mask["layers"][0]
    assert layer["mixer"]["q_proj"] == {"kernel": True, "bias": False}
    assert layer["mixer"]["generator"] == {"w1": True, "b2": False}
    assert not layer["mixer"]["A_log"] and not layer["mixer"]["dt_bias"]
    assert not layer["input_layernorm"]["scale"] and not mask["embed_tokens"]["embedding"]
    assert optim.decay_mask(params(), OptimConfig(decay_embedding=True))["embed_tokens"][
        "embedding"
    ]


def test_one_update_equals_adamw_by_hand():
    full = params()
    config = OptimConfig(
        lr=0.1, schedule="constant", weight_decay=0.5, clip_norm=1.0,
        lr_multipliers=((r"q_proj\.kernel", 0.25),),
    )  # fmt: skip
    tx, _ = optim.make_optimizer(config, 10, full)
    grads = jax.tree.map(lambda x: jnp.cos(x) + 0.1, full)
    updates, _ = tx.update(grads, tx.init(full), full)
    norm = float(optax.tree.norm(grads))
    assert norm > 1.0  # so that clipping acts

    def by_hand(g, p, decay, factor):
        g = g / norm  # clipped to 1
        adam = g / (jnp.abs(g) + config.eps)  # bias-corrected moments after one step
        return -config.lr * factor * (adam + decay * p)

    q_proj = full["layers"][0]["mixer"]["q_proj"]
    got = updates["layers"][0]["mixer"]["q_proj"]
    g = grads["layers"][0]["mixer"]["q_proj"]
    want = by_hand(g["kernel"], q_proj["kernel"], 0.5, 0.25)
    np.testing.assert_allclose(got["kernel"], want, rtol=1e-4)
    np.testing.assert_allclose(got["bias"], by_hand(g["bias"], 0, 0, 1.0), rtol=1e-4)
