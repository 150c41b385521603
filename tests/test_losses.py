"""The chunked head against the plain one."""

import re

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jet_jax import losses, sharding

B, T, D, E = 4, 10, 16, 37


def plain(hidden, head, targets, mask, z_loss=0.0):
    logits = jnp.einsum("btd,de->bte", hidden, head, precision="highest")
    log_z = jax.nn.logsumexp(logits, -1)
    hit = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (((log_z - hit) + z_loss * log_z**2) * mask).sum()


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(D, E)) * 0.3, jnp.float32)
    targets = jnp.asarray(rng.integers(0, E, (B, T)), jnp.int32)
    mask = jnp.asarray(rng.random((B, T)) < 0.7, jnp.float32)
    return hidden, head, targets, mask


# 3 tokens a chunk: T=10 takes four chunks, the last one padded.
@pytest.mark.parametrize("max_logits", [losses.MAX_LOGITS, 3 * B * E])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_value_and_gradients_equal_full_logits(inputs, max_logits, z_loss):
    hidden, head, targets, mask = inputs

    def chunked(hidden, head):
        out = losses.cross_entropy(
            hidden, head, targets, mask, z_loss=z_loss, max_logits=max_logits
        )
        return out[0] * 0.5, out[1]

    grad = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1), has_aux=True))
    (value, sums), got = grad(hidden, head)
    expected, want = jax.value_and_grad(
        lambda h, w: plain(h, w, targets, mask, z_loss) * 0.5, argnums=(0, 1)
    )(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums["loss"], plain(hidden, head, targets, mask), rtol=1e-6)
    assert sums["tokens"] == mask.sum()
    hits = (jnp.einsum("btd,de->bte", hidden, head).argmax(-1) == targets) * mask
    assert sums["correct"] == hits.sum()


def test_value_alone_equals_value_with_gradient(inputs):
    value, sums = losses.cross_entropy(*inputs, z_loss=1e-2, max_logits=3 * B * E)
    np.testing.assert_allclose(value, plain(*inputs, 1e-2), rtol=1e-6)
    assert float(sums["tokens"]) == float(inputs[3].sum())


def test_bfloat16_hidden_gives_float32_head_gradient(inputs):
    hidden, head, targets, mask = inputs
    grad = jax.grad(lambda h, w: losses.cross_entropy(h, w, targets, mask)[0], argnums=(0, 1))
    d_hidden, d_head = grad(hidden.astype(jnp.bfloat16), head)
    assert d_hidden.dtype == jnp.bfloat16 and d_head.dtype == jnp.float32
    want = jax.grad(lambda w: plain(hidden, w, targets, mask))(head)
    assert float(jnp.linalg.norm(d_head - want) / jnp.linalg.norm(want)) < 2e-2


def test_no_batch_of_logits_is_held(inputs):
    hidden, head, targets, mask = inputs
    max_logits = 2 * B * E
    jaxpr = jax.make_jaxpr(
        jax.grad(
            lambda h, w: losses.cross_entropy(h, w, targets, mask, max_logits=max_logits)[0],
            argnums=(0, 1),
        )
    )(hidden, head)
    sizes = [
        v.aval.size for eqn in _equations(jaxpr.jaxpr) for v in eqn.outvars
        if getattr(v.aval, "ndim", 0) >= 3 and v.aval.shape[-1] == E and v.aval.shape[-2] != D
    ]  # fmt: skip
    assert sizes and max(sizes) <= max_logits


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from _equations(sub)


def test_sharded_equals_unsharded(inputs):
    hidden, head, targets, mask = inputs

    @jax.jit
    def grad(hidden, head, targets, mask):
        return jax.value_and_grad(
            lambda h, w: losses.cross_entropy(h, w, targets, mask, max_logits=3 * E)[0],
            argnums=(0, 1),
        )(hidden, head)

    want = grad(hidden, head, targets, mask)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        rows = jax.device_put((hidden, targets, mask), sharding.batch_sharding(mesh))
        placed = _placed_head(head, mesh)
        lowered = grad.lower(rows[0], placed, rows[1], rows[2]).compile()
        got = lowered(rows[0], placed, rows[1], rows[2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _assert_reduced_once(lowered)


def _placed_head(head, mesh):
    split = sharding.placement("lm_head.kernel", head.shape, mesh).spec
    return jax.device_put(head, jax.NamedSharding(mesh, split))


def _assert_reduced_once(compiled):
    """The head's gradient crosses devices after the loop over chunks, never inside it."""
    body, entry = compiled.as_text().split("ENTRY")
    reduced = re.compile(rf"f32\[(1,)?{D},{E}\].*(all-reduce|reduce-scatter)\(")
    assert reduced.search(entry) and not reduced.search(body)


def test_token_logprobs(inputs):
    hidden, head, targets, _ = inputs
    got = losses.token_logprobs(hidden, head, targets, max_logits=3 * B * E)
    logp = jax.nn.log_softmax(jnp.einsum("btd,de->bte", hidden, head))
    want = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    slope = jax.grad(lambda h: losses.token_logprobs(h, head, targets).sum())(hidden)
    ones = jnp.ones_like(targets, jnp.float32)
    np.testing.assert_allclose(
        slope, -jax.grad(plain)(hidden, head, targets, ones), rtol=1e-5, atol=1e-5
    )


def plain_kl(hidden, head, teacher_hidden, teacher_head, mask):
    """Summed KL and its gradients for hidden and head, by NumPy in float64."""
    arrays = (hidden, head, teacher_hidden, teacher_head, mask)
    hidden, head, teacher_hidden, teacher_head, mask = (np.asarray(x, np.float64) for x in arrays)
    log_q, log_p = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in (hidden @ head, teacher_hidden @ teacher_head)
    )
    slope = (np.exp(log_q) - np.exp(log_p)) * mask[..., None]
    value = ((np.exp(log_p) * (log_p - log_q)).sum(-1) * mask).sum()
    return value, slope @ head.T, np.einsum("btd,bte->de", hidden, slope)


@pytest.fixture(scope="module")
def models(inputs):
    """Student, teacher of another width, and the mask."""
    hidden, head, _, mask = inputs
    rng = np.random.default_rng(1)
    teacher = jnp.asarray(rng.normal(size=(B, T, D // 2)), jnp.float32)
    teacher_head = jnp.asarray(rng.normal(size=(D // 2, E)), jnp.float32)
    return hidden, head, teacher, teacher_head, mask


# 3 tokens of both models a chunk.
@pytest.mark.parametrize("max_logits", [losses.MAX_LOGITS, 2 * 3 * B * E])
@pytest.mark.parametrize("masked", [False, True])
def test_kl_and_gradients_equal_full_logits(models, max_logits, masked):
    *arrays, mask = models
    mask = mask if masked else jnp.ones_like(mask)

    def chunked(hidden, head):
        args = hidden, head, *arrays[2:], mask
        return losses.kl_loss(*args, max_logits=max_logits) * 0.5

    value, got = jax.jit(jax.value_and_grad(chunked, argnums=(0, 1)))(*arrays[:2])
    expected, *want = plain_kl(*arrays, mask)
    np.testing.assert_allclose(value, expected / 2, rtol=1e-6)
    np.testing.assert_allclose(chunked(*arrays[:2]), value, rtol=1e-6)  # without a gradient
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b / 2, rtol=1e-5, atol=1e-6)


def test_kl_of_a_tied_head_reaches_the_embedding(models):
    hidden, head, *_, mask = models
    embedding, teacher = head.T, hidden[::-1]

    def loss(embedding, frozen):
        return losses.kl_loss(hidden, embedding.T, teacher, frozen.T, mask)

    got = jax.grad(loss)(embedding, embedding)
    want = plain_kl(hidden, head, teacher, head, mask)[2]
    np.testing.assert_allclose(got, want.T, rtol=1e-5, atol=1e-6)


def test_a_model_is_at_no_distance_from_itself(models):
    hidden, head, *_, mask = models

    def loss(hidden):
        return losses.kl_loss(hidden, head, jax.lax.stop_gradient(hidden), head, mask)

    value, slope = jax.value_and_grad(loss)(hidden.astype(jnp.bfloat16))
    assert value == 0 and not slope.any()


def test_kl_in_bfloat16(models):
    *arrays, mask = models
    hidden, head, teacher, teacher_head = arrays
    student, reference = hidden.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)

    def loss(hidden, head):
        return losses.kl_loss(hidden, head, reference, teacher_head, mask)

    value, got = jax.value_and_grad(loss, argnums=(0, 1))(student, head)
    assert value.dtype == got[1].dtype == jnp.float32 and got[0].dtype == jnp.bfloat16
    expected, *want = plain_kl(*arrays, mask)
    assert float(value) == pytest.approx(expected, rel=1e-2)
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 2e-2 * np.linalg.norm(b)


def test_head_products_of_a_kl_chunk(models):
    """Three with a frozen head, four with one that trains; bfloat16 operands throughout."""
    hidden, head, teacher, teacher_head, mask = models
    hidden, teacher = hidden.astype(jnp.bfloat16), teacher.astype(jnp.bfloat16)

    def loss(hidden, head):
        return losses.kl_loss(hidden, head, teacher, teacher_head, mask)

    for trained, count in ((0, 3), ((0, 1), 4)):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=trained))(hidden, head)
        products = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
        assert len(products) == count
        assert all(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


def test_sharded_kl_equals_unsharded(models):
    hidden, head, teacher, teacher_head, mask = models

    @jax.jit
    def grad(hidden, head, teacher, teacher_head, mask):
        return jax.value_and_grad(
            lambda h, w: losses.kl_loss(h, w, teacher, teacher_head, mask, max_logits=2 * 3 * E),
            argnums=(0, 1),
        )(hidden, head)

    want = plain_kl(*models)
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        rows = jax.device_put((hidden, teacher, mask), sharding.batch_sharding(mesh))
        heads = [_placed_head(w, mesh) for w in (head, teacher_head)]
        args = rows[0], heads[0], rows[1], heads[1], rows[2]
        compiled = grad.lower(*args).compile()
        value, slopes = compiled(*args)
    np.testing.assert_allclose(value, want[0], rtol=1e-5)
    for a, b in zip(slopes, want[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    _assert_reduced_once(compiled)
