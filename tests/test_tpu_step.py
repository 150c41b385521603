"""A training step with kernels, sharded three ways, compiled for eight TPUs that are not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from tiny import tiny_config

from jet_jax import optim, sharding, step
from kernels_pallas import backend

ATTENTION = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "qkv_bias": True}
CONFIG = tiny_config(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    mixers={
        "attn": ATTENTION,
        "swa": ATTENTION | {"window_size": 100},
        "jet": {"num_heads": 4, "head_dim": 96, "expand_v": 8 / 3, "generator_reduction": 4},
    },
    dtype="bfloat16",
)


def compile_step(config):
    """A packed training step, split three ways over eight TPUs."""
    devices = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    mesh = sharding.make_mesh(2, 2, 2, devices=devices)
    graphdef, weights = step.abstract_model(config)
    with jax.set_mesh(mesh), backend.compile_for("tpu"):
        tx, schedule = optim.make_optimizer(optim.OptimConfig(), 10, weights)
        state = jax.eval_shape(lambda x: step.init_state(x, (), tx), weights)
        train_step = step.make_train_step(graphdef, tx, schedule, state, mesh, dtype=jnp.bfloat16)
        rows = jax.ShapeDtypeStruct((8, 256), jnp.int32)
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), rows)
        batch["loss_mask"] = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        state = jax.tree.map(place, state, sharding.shardings(state, mesh))
        batch = {name: place(x, sharding.batch_sharding(mesh)) for name, x in batch.items()}
        lowered = train_step.trace(state, batch).lower(lowering_platforms=("tpu",))
        return lowered.compile()


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiling for a TPU needs libtpu: uv run --extra dev --extra tpu pytest",
)


@needs_libtpu
def test_packed_step_compiles_on_a_mesh_of_eight(fast_compiles):
    compiled = compile_step(CONFIG)
    text = compiled.as_text()
    for kernel in ("gated_delta_walk", "gated_delta_gradients", "dynamic_conv", "splash"):
        assert any(kernel in x for x in text.splitlines() if "tpu_custom_call" in x), kernel
    # The state is updated in place.
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes > 0.9 * memory.output_size_in_bytes


# Sizes that the kernels take. Of the recurrent layers these two differ most from a JetBlock: heads
# that share keys over all devices, and a decay for each key channel.
@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "kernels"),
    [
        (
            "mamba2",
            {"head_dim": 64, "state_size": 64, "expand": 4},
            ("linear_attention_scores", "linear_attention_walk_back", "linear_attention_gradients"),
        ),
        ("kda", {"num_heads": 4, "head_dim": 64}, ("kda_prepare", "kda_gradients")),
    ],
)
def test_recurrent_layers_compile_on_a_mesh_of_eight(fast_compiles, kind, options, kernels):
    compiled = compile_step(CONFIG.replace(layer_types=(kind,), mixers={kind: options}))
    calls = [line for line in compiled.as_text().splitlines() if "tpu_custom_call" in line]
    for kernel in kernels:
        assert any(kernel in call for call in calls), kernel
