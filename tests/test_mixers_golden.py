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
BFLOAT16_Y = 1.2e-2


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
        if not any(path.parent == folder for path, _ in found):
            raise ValueError(f"no blocks_*.npz in {folder}, which JET_GOLDEN_DIR names")
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
        self.index = given.get("layer_idx", 0)
        self.options = self.config.options(self.kind)
        self.mixer = self.make(self.config)
        self.graphdef, self.params = split(self.mixer)
        self.x = jnp.asarray(self.arrays["x"])
        self.run = jax.jit(lambda params, *args: nnx.merge(self.graphdef, params)(*args)[:2])

    def make(self, config, param_dtype=jnp.float32):
        """The mixer with the recorded weights; from shapes alone, since all are loaded."""
        place = Place(self.index, self.index == 0)
        mixer = nnx.eval_shape(
            lambda: MIXERS[self.kind](
                config, self.options, rngs=nnx.Rngs(0), param_dtype=param_dtype, place=place
            )
        )
        load_mixer(mixer, self.weights)
        return mixer

    def context(self, start, stop, real=None):
        """Tokens start … stop-1 of each row, of which the first `real` are no padding."""
        rows, at = self.x.shape[0], jnp.arange(start, stop, dtype=jnp.int32)
        at = jnp.broadcast_to(at, (rows, stop - start))
        v_first = self.arrays.get("v_first")
        shared = {} if v_first is None else {"v_first": jnp.asarray(v_first)[:, start:stop]}
        segment_ids = None if real is None else (at - start < real).astype(jnp.int32)
        return Context(segment_ids, at, jnp.full(rows, start, jnp.int32), shared)

    def prefill(self, real):
        """Outputs and state of a prefill of the first `real` tokens, the others being padding."""
        size, (rows, length) = self.config.hidden_size, self.x.shape[:2]
        empty = RecurrentState.init(self.options, size, rows, 0, jnp.float32, jnp.float32)
        return self.run(self.params, self.x, self.context(0, length, real), empty)


@pytest.fixture(
    scope="module", params=RECORDINGS, ids=[f"{path.stem}-{name}" for path, name in RECORDINGS]
)
def recording(request):
    return Recording(*request.param)


def relative(ours, expected):
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def test_output_and_gradients(recording):
    """Training on whole rows."""
    arrays = recording.arrays
    r, ctx = jnp.asarray(arrays["grad_r"]), recording.context(0, recording.x.shape[1])

    @jax.jit
    def gradients(params, x, shared):
        def loss(params, x, shared):
            mixer = nnx.merge(recording.graphdef, params)
            y, state, _ = mixer(x, Context(None, ctx.positions, None, shared))
            assert state is None
            return jnp.sum(y * r), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, shared)

    (of_params, of_x, of_shared), y = gradients(recording.params, recording.x, ctx.shared)
    assert relative(y, arrays["y"]) <= Y
    assert relative(of_x, arrays["grad_x"]) <= GRAD_X
    if "grad_v_first" in arrays:
        assert relative(of_shared["v_first"], arrays["grad_v_first"]) <= GRAD_X
    checked = [key for key in arrays if key.startswith("grad_w/")]
    assert checked
    # A module with the gradients for weights translates their names.
    named = mixer_state_dict(nnx.merge(recording.graphdef, of_params))
    for key in checked:
        name = key.removeprefix("grad_w/")
        assert relative(named[name], arrays[key]) <= GRAD_W, name


def test_state_after_the_last_token(recording):
    """A prefill of an empty state."""
    arrays = recording.arrays
    y, state = recording.prefill(recording.x.shape[1])
    assert relative(y, arrays["y"]) <= Y
    assert relative(state.recurrent, arrays["final_state"]) <= STATE


def test_single_steps_continue_a_prefill(recording):
    """The last tokens one at a time: the same outputs and the same final state."""
    arrays, length = recording.arrays, recording.x.shape[1]
    first = length - 5
    _, state = recording.prefill(first)
    outputs = []
    for t in range(first, length):
        here = recording.context(t, t + 1)
        y, state = recording.run(recording.params, recording.x[:, t : t + 1], here, state)
        outputs.append(y)
    assert relative(jnp.concatenate(outputs, axis=1), arrays["y"][:, first:]) <= 2 * Y
    assert relative(state.recurrent, arrays["final_state"]) <= STATE


def test_bfloat16(recording):
    """Weights, input and output in bfloat16, in which the recorded matrices and x are exact."""
    mixer = recording.make(recording.config.replace(dtype="bfloat16"), jnp.bfloat16)
    graphdef, weights = split(mixer)
    ctx = recording.context(0, recording.x.shape[1])
    ctx = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, ctx)
    run = jax.jit(lambda params, x, ctx: nnx.merge(graphdef, params)(x, ctx)[0])
    y = run(weights, recording.x.astype(jnp.bfloat16), ctx)
    assert y.dtype == jnp.bfloat16
    assert relative(y.astype(jnp.float32), recording.arrays["y"]) <= BFLOAT16_Y


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
