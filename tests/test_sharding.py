"""The mesh, the table of rules and the batch checks."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jet_jax import params, sharding
from jet_jax.config import ModelConfig

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = sorted(str(p.parent.relative_to(GOLDEN)) for p in GOLDEN.glob("**/config.json"))


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 2, 2)


def test_make_mesh_fills_the_open_axis():
    assert dict(sharding.make_mesh(data=-1, tensor=2).shape) == dict(data=4, fsdp=1, tensor=2)
    assert all(t == jax.sharding.AxisType.Auto for t in sharding.make_mesh(fsdp=-1).axis_types)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(data=3), "multiply to 8, or set one of them to -1"),
        (dict(data=-1, fsdp=3), "must divide 8"),
        (dict(data=-1, fsdp=-1), "at most one may be -1"),
        (dict(data=0, fsdp=8), "must be positive"),
    ],
)
def test_make_mesh_rejects(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_rules_serve_parameters_moments_and_stacked_weights(mesh):
    spec = P("fsdp", "tensor")
    for path in ("layers.3.mixer.q_proj.kernel", "opt_state.1.mu.layers.3.mixer.q_proj.kernel"):
        assert sharding.placement(path, (8, 8), mesh).spec == spec
    stacked = sharding.placement("layers.mixer.q_proj.kernel", (5, 8, 8), mesh)
    assert stacked.spec == P(None, "fsdp", "tensor")
    assert sharding.placement("opt_state.1.count", (), mesh).spec == P()


def test_axis_that_does_not_divide_is_dropped_and_named(mesh):
    place = sharding.placement("embed_tokens.embedding", (257, 8), mesh)
    assert place.spec == P(None, "fsdp")
    assert place.dropped == (("tensor", 257),)


def test_large_weight_needs_a_named_rule(mesh):
    with pytest.raises(ValueError, match=r"no sharding rule for layers.0.mixer.mystery"):
        sharding.placement("layers.0.mixer.mystery", (512, 512), mesh)
    # A name must match as a whole: `xq_proj` is not `q_proj`.
    assert sharding.placement("mixer.xq_proj.kernel", (4, 4), mesh).rule == "replicated"


def test_shardings_of_a_nested_tree(mesh):
    tree = {"layers": {0: {"mixer": {"o_proj": {"kernel": jnp.zeros((4, 4))}}}}}
    flat = {"layers.0.mixer.o_proj.kernel": jnp.zeros((4, 4))}
    nested = sharding.shardings(tree, mesh)["layers"][0]["mixer"]["o_proj"]["kernel"]
    assert nested.spec == P("tensor", "fsdp")
    assert sharding.shardings(flat, mesh)["layers.0.mixer.o_proj.kernel"] == nested


def test_batch_must_divide(mesh):
    sharding.check_batch(8, mesh, accumulation=2)
    with pytest.raises(ValueError) as error:
        sharding.check_batch(6, mesh)
    for part in ("batch_size=6", "divisible by 4", "4 or 8", "one of [1, 2, 3]"):
        assert part in str(error.value)


def test_put_batch_splits_rows(mesh):
    rows = np.arange(8 * 3, dtype=np.int32).reshape(8, 3)
    x = sharding.put_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(x, rows)
    assert {s.data.shape for s in x.addressable_shards} == {(2, 3)}


def test_constrain_needs_a_mesh_and_skips_what_does_not_divide(mesh):
    x = jnp.ones((4, 3, 6))
    assert sharding.constrain(x, "btd") is x

    @jax.jit
    def split(x):
        return sharding.constrain(x * 2, "btf")

    with jax.set_mesh(mesh):
        assert split(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
        odd = split(jnp.ones((4, 3, 7)))
        assert odd.sharding.shard_shape(odd.shape)[2] == 7
        assert sharding.current_batch_shards(4) == 4
        assert sharding.current_batch_shards(3) == 1


def test_constrain_inside_shard_map_does_nothing(mesh):
    def body(x):
        return sharding.constrain(x, "btd") + 1

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    np.testing.assert_array_equal(mapped(jnp.zeros((2, 1, 1))), 1)


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_weight_of_every_architecture_hits_a_named_rule(folder, mesh):
    config = ModelConfig.from_hf((GOLDEN / folder / "config.json").read_text())
    _, weights = params.abstract(config)
    vectors = re.compile(r"(\.|^)(scale|bias|A_log|dt_bias)$")
    for path, x in params.flatten(weights).items():
        rule = sharding.placement(path, x.shape, mesh).rule
        assert (rule == "replicated") == bool(vectors.search(path)), (path, rule)
