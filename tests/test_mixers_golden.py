"""The seven linear-attention mixers against recorded outputs, states and gradients.

`tests/golden/blocks_a.npz` was computed in float64 and rounded once; `JET_GOLDEN_DIR` names a
folder with more pairs `blocks_*.npz` and `.json` of the same format: for each layer its weights
`w/KEY` in the published layout, x, y, a random r, the state after the last token and the gradients
of sum(y r). The .json holds each layer's class and options.
"""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jet_jax.cache import RecurrentState
from jet_jax.config import ModelConfig
from jet_jax.hf_mixers import load_mixer, mixer_state_dict
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Context, Place
from jet_jax.params import split

KINDS = {
    "MultiScaleRetention": "retnet",
    "GatedLinearAttention": "gla",
    "DeltaNet": "deltanet",
    "GatedDeltaNet": "gdn",
    "Mamba2": "mamba2",
    "RWKV7Attention": "rwkv7",
    "KimiDeltaAttention": "kda",
}
# Facts about the model or the computation, not options of the layer.
NOT_OPTIONS = {"hidden_size", "layer_idx", "num_hidden_layers", "mode", "chunk_size", "backend"}
Y, GRAD_X, STATE, GRAD_W = 3e-6, 1e-5, 3e-6, 3e-5  # relative L2, float32


def recordings():
    """Path and layer name of everything recorded."""
    folders = [Path(__file__).parent / "golden"]
    if os.environ.get("JET_GOLDEN_DIR"):
        folders.append(Path(os.environ["JET_GOLDEN_DIR"]))
    found = []
    for folder in folders:
        for path in sorted(folder.glob("blocks_*.npz")):
            facts = json.loads(path.with_suffix(".json").read_text())
            found += [(path, name) for name in facts if not name.startswith("_")]
    return found


RECORDINGS = recordings()


class Recording:
    """One layer: our mixer with the recorded weights, and the recorded arrays."""

    def __init__(self, path, name):
        facts = json.loads(path.with_suffix(".json").read_text())[name]
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files if key.startswith(f"{name}/")}
        self.arrays = {key.removeprefix(f"{name}/"): array for key, array in arrays.items()}
        self.weights = {
            key.removeprefix("w/"): x for key, x in self.arrays.items() if key.startswith("w/")
        }
        given = facts["config"]
        self.kind = KINDS[facts["fla_class"].rsplit(".", 1)[-1]]
        options = {key: value for key, value in given.items() if key not in NOT_OPTIONS}
        self.config = ModelConfig(
            vocab_size=8,
            hidden_size=given["hidden_size"],
            intermediate_size=8,
            layer_types=(self.kind,) * given.get("num_hidden_layers", 1),
            mixers={self.kind: options},
            dtype="float32",
        )
        index = given.get("layer_idx", 0)
        self.options = self.config.options(self.kind)
        self.mixer = MIXERS[self.kind](
            self.config, self.options, rngs=nnx.Rngs(0), place=Place(index, index == 0)
        )
        load_mixer(self.mixer, self.weights)

    def context(self, rows, length):
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (rows, length))
        v_first = self.arrays.get("v_first")
        shared = {} if v_first is None else {"v_first": jnp.asarray(v_first)}
        return Context(None, positions, jnp.zeros(rows, jnp.int32), shared)

    def empty_state(self, rows):
        size = self.config.hidden_size
        return RecurrentState.init(self.options, size, rows, 0, jnp.float32, jnp.float32)


@pytest.fixture(
    scope="module", params=RECORDINGS, ids=[f"{path.stem}-{name}" for path, name in RECORDINGS]
)
def recording(request):
    return Recording(*request.param)


def relative(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def test_output_gradients_and_state(recording):
    """y and the final state by prefilling an empty state, gradients by training on whole rows."""
    arrays = recording.arrays
    graphdef, params = split(recording.mixer)
    x, r = jnp.asarray(arrays["x"]), jnp.asarray(arrays["grad_r"])
    ctx = recording.context(*x.shape[:2])

    @jax.jit
    def gradients(params, x, shared):
        def loss(params, x, shared):
            context = Context(None, ctx.positions, None, shared)
            y, state, _ = nnx.merge(graphdef, params)(x, context)
            assert state is None
            return jnp.sum(y * r), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, shared)

    @jax.jit
    def prefill(params, x, state, ctx):
        y, state, _ = nnx.merge(graphdef, params)(x, ctx, state)
        return y, state.recurrent

    (of_params, of_x, of_shared), y = gradients(params, x, ctx.shared)
    filled, final = prefill(params, x, recording.empty_state(x.shape[0]), ctx)
    assert relative(y, arrays["y"]) <= Y
    assert relative(filled, arrays["y"]) <= Y
    assert relative(final, arrays["final_state"]) <= STATE
    assert relative(of_x, arrays["grad_x"]) <= GRAD_X
    if "grad_v_first" in arrays:
        assert relative(of_shared["v_first"], arrays["grad_v_first"]) <= GRAD_X
    checked = [key for key in arrays if key.startswith("grad_w/")]
    assert checked
    # A module with the gradients for weights translates their names.
    named = mixer_state_dict(nnx.merge(graphdef, of_params))
    for key in checked:
        name = key.removeprefix("grad_w/")
        assert relative(named[name], arrays[key]) <= GRAD_W, name


def test_single_steps_continue_a_prefill(recording):
    """The last tokens one at a time: the same outputs and the same final state."""
    arrays, steps = recording.arrays, 5
    graphdef, params = split(recording.mixer)
    x = jnp.asarray(arrays["x"])
    rows, length = x.shape[:2]
    whole = recording.context(rows, length)

    @jax.jit
    def run(params, x, state, ctx):
        return nnx.merge(graphdef, params)(x, ctx, state)[:2]

    def part(start, stop):
        shared = {name: array[:, start:stop] for name, array in whole.shared.items()}
        lengths = jnp.full(rows, start, jnp.int32)
        return Context(None, whole.positions[:, start:stop], lengths, shared)

    first = length - steps
    _, state = run(params, x[:, :first], recording.empty_state(rows), part(0, first))
    outputs = []
    for t in range(first, length):
        y, state = run(params, x[:, t : t + 1], state, part(t, t + 1))
        outputs.append(y)
    assert relative(jnp.concatenate(outputs, axis=1), arrays["y"][:, first:]) <= 2 * Y
    assert relative(state.recurrent, arrays["final_state"]) <= STATE


def test_state_dicts_come_back(recording):
    """What was loaded is what is written, name by name and bit by bit."""
    written = mixer_state_dict(recording.mixer)
    assert written.keys() == recording.weights.keys()
    for name, array in recording.weights.items():
        np.testing.assert_array_equal(written[name], array, err_msg=name)


def test_a_wrong_state_dict_is_refused_by_name():
    path = Path(__file__).parent / "golden" / "blocks_a.npz"
    recording = Recording(path, "gated_deltanet")
    weights = dict(recording.weights)
    weights["f_proj.weight"] = weights.pop("a_proj.weight")
    weights["o_norm.weight"] = weights["o_norm.weight"][:-1]
    with pytest.raises(ValueError) as error:
        load_mixer(recording.mixer, weights)
    for part in ("missing    a_proj.weight", "surplus    f_proj.weight", "o_norm.weight [63]"):
        assert part in str(error.value)
