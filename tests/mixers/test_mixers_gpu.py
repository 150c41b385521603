"""Every block with its kernels on a GPU, at the search's sizes, against itself in float32.

The recorded layers of test_mixers_golden.py are too narrow for kernels (K >= 64). `-s` prints
the worst errors of every block.
"""

import jax
import jax.numpy as jnp
import pytest

from jet_jax.bench import block_rows, blocks
from jet_jax.bench.block_runs import kernel_names

pytestmark = pytest.mark.gpu

BLOCKS = {block.name: block for block in blocks.all_blocks(small=False)}
LIMIT = 3e-2  # of bfloat16 layers: some gradients of weights are sums that cancel


@pytest.mark.parametrize("name", BLOCKS)
def test_layer_and_all_its_gradients(name):
    block = BLOCKS[name]
    row = block_rows.Layer(f"{name}-test", {"B": 2, "T": 300}, block, backward=True)
    assert kernel_names(row, "pallas")
    inputs = jax.jit(row.inputs)(jax.random.key(0))
    got = jax.jit(row.function("pallas"))(*inputs)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    expected = jax.jit(row.function("reference"))(*single)
    weights = jax.eval_shape(block.weights, jax.random.key(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(weights)]
    names = ["y", *(f"d{path}" for path in paths), "dx", *(f"d{key}" for key in block.shared)]
    errors = {
        what: float(jnp.linalg.norm(x.astype(jnp.float32) - y) / jnp.linalg.norm(y))
        for what, x, y in zip(names, jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    }
    worst = sorted(errors.items(), key=lambda pair: -pair[1])[:4]
    print(f"\n{name:9}", "  ".join(f"{what} {x:.1e}" for what, x in worst))
    assert worst[0][1] <= LIMIT
