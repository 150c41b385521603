"""The supernet is the teacher on one path and each hybrid on its own, in one program."""

from functools import partial

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
import tiny
from flax import nnx

from jet_jax.models.lm import HybridLM
from jet_jax.params import split
from jet_jax.postnas.paths import FULL, LINEAR, WINDOW, PathLaw, path_of, sample_path
from jet_jax.postnas.supernet import REMATS, Supernet, shardings
from jet_jax.sharding import make_mesh

TEACHER = np.zeros(4, np.int32)


@pytest.fixture(scope="module")
def forward():
    """Logits of a path; a new one must not compile anew."""
    net = nets.supernet()

    @jax.jit
    def run(params, path, tokens, segment_ids):
        hidden, _ = net.run(params, path, tokens, segment_ids)
        return hidden @ net.head_kernel(params)

    return run


def batch():
    got = tiny.random_batch(0, 2, 24, vocab=61)
    return jnp.asarray(got["tokens"]), jnp.asarray(got["segment_ids"])


def extracted(path):
    net = nets.supernet()
    config = net.hybrid(path)
    graphdef = split(nnx.eval_shape(lambda: HybridLM(config, rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graphdef, net.extract(nets.params(), path))


def relative(got, expected, segment_ids):
    real = segment_ids != 0
    return float(jnp.linalg.norm((got - expected)[real]) / jnp.linalg.norm(expected[real]))


def test_the_teachers_path_is_the_teacher(forward):
    tokens, segment_ids = batch()
    got = forward(nets.params(), TEACHER, tokens, segment_ids)
    expected = jax.jit(lambda *a: nets.teacher()(*a))(tokens, segment_ids)
    assert relative(got, expected, segment_ids) <= 1e-5


def test_a_path_equals_the_hybrid_taken_out_of_it(forward):
    tokens, segment_ids = batch()
    path = np.array([LINEAR, WINDOW, FULL, LINEAR], np.int32)
    model = extracted(path)
    assert model.config.layer_types == ("gla", "swa", "attn", "gla")
    assert model.config.options("swa").window_size == 5
    expected = jax.jit(lambda *a: model(*a))(tokens, segment_ids)
    got = forward(nets.params(), path, tokens, segment_ids)
    assert relative(got, expected, segment_ids) <= 1e-5
    other = forward(nets.params(), TEACHER, tokens, segment_ids)
    assert relative(other, expected, segment_ids) > 0.05  # the path counts


def test_gradients_of_a_path_are_those_of_its_hybrid():
    tokens, segment_ids = batch()
    path = np.array([LINEAR, WINDOW, FULL, LINEAR], np.int32)
    net, params = nets.supernet(), nets.params()
    graphdef = split(extracted(path))[0]
    probe = (
        jax.random.normal(jax.random.key(0), (*tokens.shape, 32)) * (segment_ids != 0)[..., None]
    )

    def through_supernet(remat, trained, path):
        hidden, errors = net.run(
            params | trained, path, tokens, segment_ids, each=lambda y, _: (y**2).sum(), remat=remat
        )
        return (hidden * probe).sum() + errors.sum()

    def through_hybrid(trained):
        model = nnx.merge(graphdef, net.extract(params | trained, path))
        out = model.forward(
            tokens, segment_ids=segment_ids, logits_at="none", collect=("mixer_outputs",)
        )
        errors = sum((y**2).sum() for y in out.features["mixer_outputs"])
        return (out.hidden * probe).sum() + errors

    trained = {"linear": params["linear"], "full": params["teacher"]["layers"]["mixer"]}
    want = jax.jit(jax.grad(through_hybrid))(trained)
    for remat in REMATS:
        got = jax.jit(jax.grad(partial(through_supernet, remat)))(trained, path)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))
        kernels = {part: tree["o_proj"]["kernel"] for part, tree in got.items()}
        used = {part: [bool(x.any()) for x in kernel] for part, kernel in kernels.items()}
        assert used == {"linear": [True, False, False, True], "full": [False, True, True, False]}


def test_an_unknown_remat_is_refused():
    with pytest.raises(ValueError, match="unknown remat 'all' .* known: mixer, layer"):
        nets.supernet().run(nets.params(), jnp.asarray(TEACHER), *batch(), remat="all")


def test_one_program_serves_all_paths(forward):
    tokens, segment_ids = batch()
    seen = []
    for seed in range(4):
        path = np.asarray(
            sample_path(PathLaw(max_full=4), jax.random.key(seed), jnp.asarray(TEACHER))
        )
        seen.append(np.asarray(forward(nets.params(), path, tokens, segment_ids)))
    assert forward._cache_size() == 1
    assert len({x.tobytes() for x in seen}) > 1
    again = forward(nets.params(), path, tokens, segment_ids)
    assert np.array_equal(again, seen[-1])  # bit-equal


def test_a_windowed_teacher_is_a_path_too():
    config = nets.teacher_config(
        layer_types=("swa", "attn", "swa", "swa"),
        mixers={
            kind: {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "window_size": window}
            for kind, window in (("attn", None), ("swa", 3))
        },
    )
    net = Supernet.of(config, nets.KIND, nets.OPTIONS)
    assert net.teacher_path.tolist() == [WINDOW, FULL, WINDOW, WINDOW]
    assert net.hybrid(net.teacher_path).layer_types == config.layer_types
    assert path_of(net.teacher_path, [0, 1]).tolist() == [WINDOW, FULL, LINEAR, LINEAR]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("attn", "gla"), "mixers": {"gla": nets.OPTIONS}}, "type gla"),
        ({"use_post_norms": True}, "Gemma 3"),
        ({"layer_types": ("attn", "swa"), "mixers": {"swa": {"head_dim": 4, "window_size": 3}}},
         "more than the window"),
    ],
)  # fmt: skip
def test_teachers_that_do_not_stack_are_refused(changes, message):
    attention = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    mixers = {"attn": attention} | {
        kind: (attention if kind == "swa" else {}) | options
        for kind, options in changes.get("mixers", {}).items()
    }
    config = nets.teacher_config(**(changes | {"mixers": mixers}))
    with pytest.raises(ValueError, match=message):
        Supernet.of(config, nets.KIND, nets.OPTIONS)


@pytest.mark.parametrize("kind", ["attn", "rwkv7", "mixer"])
def test_kinds_that_are_no_linear_path_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind}.* is no linear path"):
        Supernet.of(nets.teacher_config(), kind, {})


def test_paths_are_checked():
    with pytest.raises(ValueError, match="layer 4 does not exist: there are 0 to 3"):
        path_of(TEACHER, [4])
    with pytest.raises(ValueError, match="layer 1 is named twice"):
        path_of(TEACHER, [1], [1])
    with pytest.raises(ValueError, match="give the supernet a window"):
        Supernet.of(nets.teacher_config(), nets.KIND, nets.OPTIONS).hybrid([0, 2, 0, 0])
    with pytest.raises(ValueError, match="shape .3,. for 4 layers"):
        nets.supernet().hybrid([0, 1, 0])


def test_few_full_draws_each_number_and_each_layer_evenly():
    law = PathLaw("few_full", max_full=2)
    draw = jax.jit(jax.vmap(lambda key: sample_path(law, key, jnp.asarray(TEACHER))))
    kept = np.asarray(draw(jax.random.split(jax.random.key(0), 3000))) != LINEAR
    counts = np.bincount(kept.sum(1), minlength=3) / 3000
    assert np.abs(counts - 1 / 3).max() < 0.04
    assert np.abs(kept.mean(0) - 0.25).max() < 0.04


def test_stacked_weights_are_split_as_single_layers_are():
    mesh = make_mesh(2, 2, 2)
    where = shardings(nets.params(), mesh)
    kernel = where["teacher"]["layers"]["mixer"]["q_proj"]["kernel"].spec
    assert kernel == jax.P(None, "fsdp", "tensor")
    assert where["linear"]["q_proj"]["kernel"].spec == jax.P(None, "fsdp", "tensor")
    assert where["teacher"]["layers"]["input_layernorm"]["scale"].is_fully_replicated
    wide = {"teacher": {"layers": {"norm": {"scale": jax.ShapeDtypeStruct((36, 2048), "float32")}}}}
    assert shardings(wide, mesh)["teacher"]["layers"]["norm"]["scale"].is_fully_replicated
