"""Linear mixers that start from attention: what is copied, what is not, and the refitted output."""

import importlib
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jet_jax.config import ModelConfig
from jet_jax.mixer_options import AttentionOptions
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Context, Place
from jet_jax.params import flatten, split, unflatten
from jet_jax.postnas.inherit import (
    NormalEquations,
    from_attention,
    matched_options,
    output_inputs,
    refit_output,
)

D, H, N, K = 24, 4, 2, 6
KV_OF_HEAD = [0, 0, 1, 1]
ATTENTION = AttentionOptions(H, N, K, qkv_bias=True, o_bias=True, qk_norm=True)
CASES = {
    "retnet": {"use_short_conv": True, "conv_bias": True},
    "gla": {"num_kv_heads": 2},
    "deltanet": {},
    "gdn": {},
    "jet": {},
    "kda": {"conv_bias": True},
    "mamba2": {"dt_limit": (1.0, 1.0)},  # the values are multiplied with the step size
    "rwkv7": {},
    # More, and more heads, than the attention has.
    "jet wide": {"expand_v": 2.0},
    "jet static": {"dynamic": (), "static": ("query", "key", "value"), "use_gate": False},
    "jet mixed": {"dynamic": ("query", "key"), "static": ("value",), "freeze_generator": True},
    "gdn wide": {"num_v_heads": 8, "head_dim": 8},
    "mamba2 wide": {"dt_limit": (1.0, 1.0), "use_bias": True, "expand": 2, "state_size": 7},
    "rwkv7 wide": {"num_heads": None, "head_dim": 6, "value_dim": 32},
}
SILU = ("deltanet", "gdn", "jet", "kda", "mamba2", "retnet")  # the last with convolutions


def config_with(kind, options, attention=ATTENTION, width=D):
    return ModelConfig(
        vocab_size=8,
        hidden_size=width,
        intermediate_size=8,
        layer_types=(kind,) * 2,
        mixers={"attn": attention, kind: options},
        dtype="float32",
    )


def weights_of(config, kind, seed, layers=None):
    """A mixer's structure and random weights of order 1, stacked if `layers` is given."""
    make = partial(MIXERS[kind], config, config.options(kind), place=Place())
    graphdef, shapes = split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)
    return graphdef, unflatten(
        {
            path: jnp.asarray(rng.standard_normal((*lead, *a.shape)) / a.shape[0] ** 0.5, a.dtype)
            for path, a in flatten(shapes).items()
        }
    )


def positions_like(x):
    return jnp.zeros(x.shape[:2], jnp.int32)  # at position 0 RetNet does not rotate


def teacher_rows(attention, x, bias=False):
    """q, k and v by the heads of the queries, [B, T, H, K], before rotation."""
    out = {}
    for name, heads in (("q", H), ("k", N), ("v", N)):
        kernel = np.asarray(attention[f"{name}_proj"]["kernel"], np.float64).reshape(D, heads, K)
        out[name] = np.einsum("btd,dhk->bthk", np.asarray(x, np.float64), kernel)
        if bias:
            out[name] += np.asarray(attention[f"{name}_proj"]["bias"]).reshape(heads, K)
        out[name] = out[name] if name == "q" else out[name][:, :, KV_OF_HEAD]
    return out


def intercept(monkeypatch, kind, seen):
    """Has the mixer hand q, k and v to `seen` in place of its recurrence, which gives v."""

    def recur(chunk, step, inputs, state, ctx, **options):
        seen.update({name: array for name, (array, _) in inputs.items()})
        return seen["v"], jnp.zeros(())

    name = "retnet" if kind == "gla" else kind
    module = importlib.import_module(f"jet_jax.mixers.{name}")
    monkeypatch.setattr(module, "recur", recur)


@pytest.mark.parametrize("case", CASES)
def test_a_mixer_sees_the_q_k_v_of_the_attention(case, monkeypatch):
    kind = case.split()[0]
    options = replace(matched_options(kind, ATTENTION, D), **CASES[case])
    config = config_with(kind, options)
    _, attention = weights_of(config, "attn", 1, layers=2)
    graphdef, fresh = weights_of(config, kind, 2, layers=2)
    if kind == "rwkv7":
        fresh["k_a"] = jnp.zeros_like(fresh["k_a"])  # the key's own change by a
    if kind == "jet":
        for name in options.generators.values():
            fresh[name]["w2"] = jnp.zeros_like(fresh[name]["w2"])
    x = jax.random.normal(jax.random.key(0), (2, 5, D))
    seen = {}
    intercept(monkeypatch, kind, seen)

    @jax.jit
    def run(attention, fresh, x):
        copied = jax.vmap(partial(from_attention, config, kind))(attention, fresh)
        one = jax.tree.map(lambda a: a[1], copied)
        ctx = Context(None, positions_like(x))
        features, _ = output_inputs(graphdef, one, x, ctx)
        return one, dict(seen), features, nnx.merge(graphdef, one)(x, ctx)[0]

    copied, got, features, y = run(attention, fresh, x)
    attention, fresh = (jax.tree.map(lambda a: a[1], tree) for tree in (attention, fresh))

    # The rows that reach the recurrence. Mixer head j stands for attention head j / repeats.
    expected = teacher_rows(attention, x, bias=case == "mamba2 wide")
    heads = got["v"].shape[2]
    for name, want in expected.items():
        rows = np.repeat(got[name], heads // got[name].shape[2], axis=2)
        want = np.repeat(want, heads // H, axis=2)
        want = want / (1 + np.exp(-want)) if kind in SILU else want
        np.testing.assert_allclose(rows[..., :K], want, rtol=1e-4, atol=1e-5)

    # The output: the attention's matrix in the leading channels of each head.
    name = "out_proj" if kind == "mamba2" else "o_proj"
    kernel = np.asarray(copied[name]["kernel"]).reshape(heads, -1, D)
    given = np.asarray(attention["o_proj"]["kernel"]).reshape(H, K, D)
    np.testing.assert_array_equal(kernel[:, :K] * (heads // H), given.repeat(heads // H, axis=0))
    np.testing.assert_array_equal(
        kernel[:, K:], np.asarray(fresh[name]["kernel"]).reshape(heads, -1, D)[:, K:]
    )
    again = features @ copied[name]["kernel"]
    if "bias" in copied[name]:
        np.testing.assert_array_equal(copied[name]["bias"], attention["o_proj"]["bias"])
        again = again + copied[name]["bias"]
    np.testing.assert_allclose(again, y, rtol=1e-4, atol=1e-5)

    # Everything else, in structure and value.
    assert jax.tree.structure(copied) == jax.tree.structure(fresh)
    old, new = flatten(fresh), flatten(copied)
    changed = ("q_proj", "k_proj", "v_proj", "r_proj", "o_proj", "in_proj", "out_proj")
    changed += ("q_conv1d", "k_conv1d", "v_conv1d", "conv1d", "x_r", "x_k", "x_v")
    for path, value in new.items():
        assert value.dtype == old[path].dtype and value.shape == old[path].shape
        if path.split(".")[0] not in changed and not path.endswith("generator.b2"):
            np.testing.assert_array_equal(value, old[path], path)
    if kind == "mamba2":
        inner, _, bc, _ = options.projected(D)
        for part in (slice(None, inner), slice(2 * inner + bc, None)):  # z and δ
            np.testing.assert_array_equal(
                new["in_proj.kernel"][:, part], old["in_proj.kernel"][:, part]
            )


@pytest.mark.parametrize("kind", [case for case in CASES if " " not in case])
def test_matched_options_have_the_heads_of_the_attention(kind):
    for width in (D, 16):  # 4 heads of 6 are as wide as the model, and wider
        options = matched_options(kind, ATTENTION, width)
        if kind == "jet":
            assert (options.num_heads, options.head_dim, options.value_dim) == (H, K, K)
        else:
            key = width // H if kind == "rwkv7" else K
            assert options.state_shape(width) == (H, key, K)
    assert kind != "mamba2" or options.n_groups == H


@pytest.fixture(scope="module")
def gla():
    """A copied GLA with no decay and no gate, its outputs and features, and the attention's."""
    attention_options = AttentionOptions(H, N, K)
    options = replace(
        matched_options("gla", attention_options, D), clamp_min=0.0, use_output_gate=False
    )
    config = config_with("gla", options, attention_options)
    teacher, attention = weights_of(config, "attn", 3)
    graphdef, fresh = weights_of(config, "gla", 4)
    x = jax.random.normal(jax.random.key(1), (64, 9, D))

    @jax.jit
    def run(attention, fresh, x):
        copied = from_attention(config, "gla", attention, fresh)
        ctx = Context(None, positions_like(x))
        features, _ = output_inputs(graphdef, copied, x, ctx)
        target = nnx.merge(teacher, attention)(x, ctx)[0]
        return copied, nnx.merge(graphdef, copied)(x, ctx)[0], features, target

    return attention, fresh, x, *run(attention, fresh, x)


def test_gla_equals_its_equation_on_the_weights_of_the_attention(gla):
    attention, fresh, x, _, y, *_ = gla
    rows = teacher_rows(attention, x)
    scores = np.einsum("bthk,bshk->bhts", rows["q"], rows["k"]) / np.sqrt(K)
    o = np.einsum("bhts,bshv->bthv", np.tril(scores), rows["v"])
    o = o / np.sqrt(np.mean(o**2, axis=-1, keepdims=True) + 1e-5)
    o = o * np.asarray(fresh["g_norm"]["scale"])
    expected = o.reshape(*x.shape[:2], -1) @ np.asarray(attention["o_proj"]["kernel"])
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_refit_brings_the_outputs_nearer_to_the_attention(gla):
    *_, copied, _, features, target = gla
    start = copied["o_proj"]["kernel"]
    kernel = jax.jit(refit_output)(features[:48], target[:48], start=start)
    x, y = (np.asarray(a[48:]) for a in (features, target))  # rows that it has not seen
    before, after, nothing = (np.sum((x @ w - y) ** 2) for w in (start, kernel, 0 * kernel))
    assert after < 0.95 * min(before, nothing), (before, after, nothing)


def equations(seed, layers, rows=40, features=5, outputs=3):
    rng = np.random.default_rng(seed)
    shapes = ((rows, features), (rows, outputs), (features, outputs))
    return tuple(jnp.asarray(rng.standard_normal((layers, *s)), jnp.float32) for s in shapes)


def test_refit_without_ridge_is_least_squares_for_every_layer():
    x, y, start = equations(0, 3)
    got = jax.vmap(lambda x, y, w: refit_output(x, y, 0, start=w))(x, y, start)
    for i in range(3):
        expected = np.linalg.lstsq(x[i], y[i], rcond=None)[0]
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)


def test_refit_minimises_what_it_says():
    (x,), (y,), (start,) = equations(1, 1)
    got = refit_output(x, y, 0.3, start=start)
    # Held at its start by rows of its own: plain least squares on more rows.
    pull = np.sqrt(0.3 * np.mean(np.sum(x**2, axis=0))) * np.eye(5)
    expected = np.linalg.lstsq(np.r_[x, pull], np.r_[y, pull @ start], rcond=None)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_normal_equations_add_up_over_batches_and_leave_masked_rows_out():
    (x,), (y,), (start,) = equations(2, 1)
    whole = refit_output(x, y, start=start)
    sums = NormalEquations.zeros(5, 3).add(x[:12], y[:12])
    mask = jnp.arange(56).reshape(2, 28) < 28  # the second row is padding
    padded = [jnp.stack([a[12:], jnp.full_like(a[12:], jnp.nan)]) for a in (x, y)]
    sums = sums.add(*padded, mask)
    np.testing.assert_allclose(sums.solve(start), whole, rtol=1e-4, atol=1e-5)
    nothing = NormalEquations.zeros(5, 3).solve(start)
    np.testing.assert_array_equal(nothing, start)
    one = refit_output(x[:1], y[:1], start=start)  # fewer rows than features
    assert np.isfinite(one).all()
    with pytest.raises(ValueError, match="ridge=-1 must not be negative"):
        refit_output(x, y, -1, start=start)


MISFITS = [
    ("gdn", {"num_heads": 4, "head_dim": 4}, "q_proj: the mixer's heads are 4 wide, fewer .* 6"),
    ("gla", {"num_heads": 3}, "q_proj: the mixer's 3 heads are no multiple of the attention's 4"),
    ("gla", {"num_heads": 4, "expand_k": 1, "num_kv_heads": 1}, "k_proj: the mixer's 1 heads .* 2"),
    ("jet", {"num_heads": 4, "head_dim": 6, "expand_v": 0.5, "generator_reduction": 1},
     "v_proj: the mixer's heads are 3 wide"),
    ("mamba2", {"head_dim": 6, "expand": 1, "n_groups": 2}, "q_proj: the mixer's 2 heads"),
    ("rwkv7", {"head_dim": 12}, "r_proj: the mixer's 2 heads"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "message"), MISFITS)
def test_sizes_that_do_not_fit(kind, options, message):
    config = config_with(kind, options)
    _, attention = weights_of(config, "attn", 1)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            partial(from_attention, config, kind), attention, weights_of(config, kind, 2)[1]
        )


def test_attention_weights_of_another_config():
    config = config_with("gdn", matched_options("gdn", ATTENTION, D))
    other = config_with("gdn", matched_options("gdn", ATTENTION, 16), width=16)
    _, fresh = weights_of(config, "gdn", 1)
    with pytest.raises(ValueError, match=r"shapes \(16, 24\) and \(16, 12\) fit no options"):
        from_attention(config, "gdn", weights_of(other, "attn", 1)[1], fresh)
