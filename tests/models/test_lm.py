"""HybridLM: the start of training, logits at chosen positions, remat, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

from jet_jax.cache import init_cache
from jet_jax.models import remat
from jet_jax.models.lm import HybridLM
from jet_jax.params import flatten, split

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (2, 9)), jnp.int32)
SEGMENTS = jnp.asarray([[1] * 6 + [0] * 3, [0] * 2 + [1] * 7], jnp.int32)


def test_logits_at_positions(hybrid):
    """ "last", indices and "none" pick from the same logits; hidden states feed the head."""
    graphdef, params = split(hybrid)

    @jax.jit
    def run(params, at):
        model = nnx.merge(graphdef, params)
        full = model.forward(TOKENS, segment_ids=SEGMENTS, collect=("hidden_states",))
        picked = [
            model.forward(TOKENS, segment_ids=SEGMENTS, logits_at=x).logits
            for x in ("last", at, "none")
        ]
        return full, picked, full.hidden @ model.head_kernel()

    full, (last, chosen, none), product = run(params, jnp.array([3, 2]))
    assert full.logits.dtype == jnp.float32 and full.logits.shape == (2, 9, 257)
    np.testing.assert_allclose(last, full.logits[jnp.arange(2), jnp.array([5, 8])], rtol=1e-4)
    np.testing.assert_allclose(chosen, full.logits[jnp.arange(2), jnp.array([3, 2])], rtol=1e-4)
    assert none is None
    assert len(full.features["hidden_states"]) == 4
    np.testing.assert_array_equal(full.features["hidden_states"][-1], full.hidden)
    np.testing.assert_allclose(product, full.logits, rtol=1e-3, atol=1e-4)


def test_untied_head_has_its_own_weights():
    config = tiny_config(tie_word_embeddings=False)
    graphdef, params = split(HybridLM(config, rngs=nnx.Rngs(0)))
    assert params["lm_head"]["kernel"].shape == (48, 257)
    model = nnx.merge(graphdef, params)
    np.testing.assert_array_equal(model.head_kernel(), params["lm_head"]["kernel"])


def test_a_fresh_model_predicts_nothing(hybrid):
    """Standard deviation 0.02 and norms of one: the first loss is near ln 257."""
    graphdef, params = split(HybridLM(tiny_config(), rngs=nnx.Rngs(0)))
    logits = jax.jit(lambda p: nnx.merge(graphdef, p)(TOKENS))(params)
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    loss = -jnp.take_along_axis(logprobs, TOKENS[:, 1:, None], axis=-1).mean()
    assert abs(float(loss) - np.log(257)) < 0.3
    scales = {n: x for n, x in flatten(params).items() if n.endswith("scale")}
    assert len(scales) == 8 and all((np.asarray(x) == 1).all() for x in scales.values())


def test_remat_changes_no_gradient():
    """What a layer keeps for its backward pass is no part of the result."""
    config = tiny_config(layer_types=("jet", "attn"))
    model = HybridLM(config, rngs=nnx.Rngs(0))

    def gradient(policy):
        model.remat = policy
        graphdef, params = split(model)
        return jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(TOKENS) ** 2)))(params)

    plain, full = flatten(gradient("none")), flatten(gradient("full"))
    for name, value in plain.items():
        size = np.abs(value).max() + 1e-12
        np.testing.assert_allclose(full[name], value, atol=1e-5 * size, err_msg=name)


def test_unknown_remat_policy():
    with pytest.raises(ValueError, match="unknown remat policy 'half'; known: none, full, .*dots"):
        remat.check("half")


def test_errors(hybrid):
    """What does not fit is refused before anything runs."""
    cache = init_cache(hybrid.config, 2, 16)
    for message, options in [
        ("positions follow from the cache", {"positions": SEGMENTS, "cache": cache}),
        ("the cache has 3 layers and 3 rows, but the model has 3 layers and tokens 2 rows",
         {"cache": init_cache(hybrid.config, 3, 16)}),
        ("9 tokens do not fit in a cache of 8 a row", {"cache": init_cache(hybrid.config, 2, 8)}),
        ("logits_at='first'", {"logits_at": "first"}),
        ("collect: unknown 'attention'", {"collect": ("attention",)}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            hybrid.forward(TOKENS, **options)


def test_values_are_checked_outside_of_jit(hybrid):
    """Ids that would be clamped, and segments that would be mixed up, without a word."""
    with pytest.raises(ValueError, match="tokens holds ids from 0 to 257, but the vocabulary has"):
        hybrid(jnp.asarray([[0, 257]], jnp.int32))
    with pytest.raises(ValueError, match="row 0"):
        hybrid(jnp.ones((1, 3), jnp.int32), jnp.asarray([[1, 2, 1]], jnp.int32))
