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
        split = sharding.placement("lm_head.kernel", head.shape, mesh).spec
        placed = jax.device_put(head, jax.NamedSharding(mesh, split))
        lowered = grad.lower(rows[0], placed, rows[1], rows[2]).compile()
        got = lowered(rows[0], placed, rows[1], rows[2])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # The head's gradient crosses devices after the loop over chunks, never inside it.
    body, entry = lowered.as_text().split("ENTRY")
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
