"""Recomputes recorded outputs of a model and measures how far the results are from them.

A recording is an .npz of arrays; each array here has one check. Arrays and their meaning:

| array | recomputed by |
|---|---|
| `logits`, `hidden_states` | one forward pass of `input_ids` [B, T] |
| `incremental_logits` | a prefill of the first `prefill_len` tokens, then one token at a time |
| `greedy_tokens` | `generate` on the first `greedy_prompt_len` tokens (default: all) |
| `padded_logits` | a forward pass of `padded_input_ids` under `attention_mask` |

Every other array of the file but the inputs named above is reported as unknown, and fails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jet_jax
from jet_jax.cache import init_cache
from jet_jax.models.lm import HybridLM
from jet_jax.params import split

INPUTS = {
    "input_ids",
    "prefill_len",
    "greedy_prompt_len",
    "padded_input_ids",
    "attention_mask",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
      name: the array compared.
      passed: whether it is within the tolerance, or equal.
      error: relative L2 error; None when tokens are compared or nothing could be.
      note: what the reader should know besides.
    """

    name: str
    passed: bool
    error: float | None = None
    note: str = ""


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    """`|ours - expected| / |expected|` in float64 over all elements; nan if any is not finite."""
    a, b = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    size, difference = np.linalg.norm(b), np.linalg.norm(a - b)
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / size)


class Recomputation:
    """The model's own values of the arrays of one recording.

    Args:
      model: computes in float32 to be compared at float32 tolerances.
      recording: the arrays of the .npz.
    """

    def __init__(self, model: HybridLM, recording: Mapping[str, np.ndarray]):
        self.model = model
        self.recording = recording
        graphdef, self.params = split(model)

        def run(params, tokens, segment_ids=None, cache=None, logits_at=None, collect=()):
            output = nnx.merge(graphdef, params).forward(
                tokens,
                segment_ids=segment_ids,
                cache=cache,
                logits_at=logits_at,
                collect=collect,
            )
            return output.logits, output.features, output.cache

        self._run = jax.jit(run, static_argnames=("logits_at", "collect"))

    def input(self, name: str) -> np.ndarray:
        """An input array of the recording, checked: token ids of rank 2 within the vocabulary.

        Raises:
          ValueError: it is missing, or not what it should be.
        """
        if name not in self.recording:
            raise ValueError(f"the file has no {name!r}, which this array needs")
        array = np.asarray(self.recording[name])
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"{name} has dtype {array.dtype}, expected integers")
        if name.endswith("input_ids"):
            vocab = self.model.config.vocab_size
            if array.ndim != 2 or array.size == 0:
                raise ValueError(f"{name} has shape {array.shape}, expected [B, T]")
            if array.min() < 0 or array.max() >= vocab:
                raise ValueError(
                    f"{name} holds ids from {array.min()} to {array.max()}, but the vocabulary "
                    f"has {vocab}"
                )
        return array.astype(np.int32)

    def forward(self, tokens: np.ndarray, **options: Any) -> tuple[Any, Any, Any]:
        """Logits, collected features and cache of one jitted call."""
        return self._run(self.params, jnp.asarray(tokens), **options)

    def logits(self) -> np.ndarray:
        """Float32 [B, T, E]."""
        return np.asarray(self.forward(self.input("input_ids"), collect=("hidden_states",))[0])

    def hidden_states(self) -> np.ndarray:
        """[L+1, B, T, D] as `Output.features` describes them."""
        features = self.forward(self.input("input_ids"), collect=("hidden_states",))[1]
        return np.stack([np.asarray(h) for h in features["hidden_states"]])

    def incremental_logits(self) -> np.ndarray:
        """[B, 1 + T - n, E]: the last position of a prefill of n tokens, then each further one."""
        ids, n = self.input("input_ids"), int(self.input("prefill_len"))
        rows, length = ids.shape
        if not 1 <= n <= length:
            raise ValueError(f"prefill_len={n} does not lie within the {length} tokens")
        cache = init_cache(self.model.config, rows, length)
        steps = []
        for start, stop in [(0, n)] + [(t, t + 1) for t in range(n, length)]:
            logits, _, cache = self.forward(ids[:, start:stop], cache=cache, logits_at="last")
            steps.append(np.asarray(logits))
        return np.stack(steps, axis=1)

    def greedy_tokens(self) -> np.ndarray:
        """[B, n] greedy continuations, n as recorded."""
        ids = self.input("input_ids")
        length = ids.shape[1]
        if "greedy_prompt_len" in self.recording:
            length = int(self.input("greedy_prompt_len"))
        count = np.asarray(self.recording["greedy_tokens"]).shape[-1]
        prompts = [row[:length].tolist() for row in ids]
        return np.asarray(jet_jax.generate(self.model, prompts, max_new_tokens=count, eos_id=()))

    def mask(self) -> np.ndarray:
        """`attention_mask` [B, T] as booleans: which positions of the padded rows are real."""
        mask = self.input("attention_mask") != 0
        if mask.shape != self.input("padded_input_ids").shape:
            raise ValueError(
                f"attention_mask has shape {mask.shape}, padded_input_ids "
                f"{self.input('padded_input_ids').shape}"
            )
        return mask

    def padded_logits(self) -> np.ndarray:
        """Float32 [B, T, E]; meaningless where the mask is 0."""
        ids, mask = self.input("padded_input_ids"), self.mask()
        return np.asarray(self.forward(ids, segment_ids=jnp.asarray(mask, jnp.int32))[0])

    def unpadded_logits(self) -> np.ndarray:
        """As `padded_logits`, each row run alone and without its padding; 0 where padded."""
        ids, mask = self.input("padded_input_ids"), self.mask()
        out = np.zeros((*ids.shape, self.model.config.vocab_size), np.float32)
        for row, real in enumerate(mask):
            out[row, real] = np.asarray(self.forward(ids[row : row + 1, real])[0])[0]
        return out


def _compare(name: str, ours: np.ndarray, expected: np.ndarray, tolerance: float) -> Check:
    if ours.shape != expected.shape:
        return Check(name, False, note=f"has shape {expected.shape}, the model gives {ours.shape}")
    error = relative_error(ours, expected)
    note = ""
    if not np.isfinite(expected).all():
        note = "the file holds values that are not finite"
    elif not np.isfinite(ours).all():
        note = "the model gives values that are not finite"
    return Check(name, bool(error <= tolerance), error, note)


def _check_hidden(run: Recomputation, expected: np.ndarray, tolerance: float) -> Iterator[Check]:
    ours = run.hidden_states()
    check = _compare("hidden_states", ours, expected, tolerance)
    if check.error is not None:
        layers = [relative_error(a, b) for a, b in zip(ours, expected, strict=True)]
        worst = int(np.argmax(layers))
        note = f"worst: entry {worst} of {len(layers)}, {layers[worst]:.1e}"
        check = dataclasses.replace(check, note=check.note or note)
    yield check


def _check_greedy(run: Recomputation, expected: np.ndarray, tolerance: float) -> Iterator[Check]:
    ours = run.greedy_tokens()
    if ours.shape != expected.shape:
        note = f"has shape {expected.shape}, the model gives {ours.shape}"
        yield Check("greedy_tokens", False, note=note)
        return
    different = np.argwhere(ours != expected)
    note = f"all {expected.size} tokens equal"
    if len(different):
        row, at = different[0]
        note = (
            f"{len(different)} of {expected.size} tokens differ, first in row {row} at {at}: "
            f"{ours[row, at]} instead of {expected[row, at]}"
        )
    yield Check("greedy_tokens", not len(different), note=note)


def _check_padded(run: Recomputation, expected: np.ndarray, tolerance: float) -> Iterator[Check]:
    ours, real = run.padded_logits(), run.mask()
    if ours.shape != expected.shape:
        note = f"has shape {expected.shape}, the model gives {ours.shape}"
        yield Check("padded_logits", False, note=note)
        return
    alone = run.unpadded_logits()
    # A recording may hold no number where its maker's attention met rows with nothing to see.
    known = real & np.isfinite(expected).all(axis=-1)
    missing = int(real.sum() - known.sum())
    note = f"{missing} of {int(real.sum())} real positions hold no number in the file"
    if not known.any():
        yield Check("padded_logits", True, note=f"not comparable: {note}")
    else:
        check = _compare("padded_logits", ours[known], expected[known], tolerance)
        yield dataclasses.replace(check, note=check.note or (note if missing else ""))
    yield _compare("padded rows vs the same tokens alone", ours[real], alone[real], tolerance)


def _check_plain(name: str) -> Callable[..., Iterator[Check]]:
    def check(run: Recomputation, expected: np.ndarray, tolerance: float) -> Iterator[Check]:
        yield _compare(name, getattr(run, name)(), expected, tolerance)

    return check


CHECKS: dict[str, Callable[..., Iterator[Check]]] = {
    "logits": _check_plain("logits"),
    "hidden_states": _check_hidden,
    "incremental_logits": _check_plain("incremental_logits"),
    "greedy_tokens": _check_greedy,
    "padded_logits": _check_padded,
}


def verify(
    model: HybridLM, recording: Mapping[str, np.ndarray], tolerance: float = 2e-5
) -> Iterator[Check]:
    """Checks every array of a recording, one by one.

    Args:
      model: computes in float32.
      recording: array name → array, as in the table above.
      tolerance: the largest relative L2 error that passes.

    Yields:
      One `Check` an array, and one more for padded rows. Arrays that cannot be checked fail.
    """
    run = Recomputation(model, recording)
    outputs = [name for name in recording if name not in INPUTS]
    if not outputs:
        note = f"the file holds no output; known are {', '.join(CHECKS)}"
        yield Check("recording", False, note=note)
    for name in [*(n for n in CHECKS if n in outputs), *(n for n in outputs if n not in CHECKS)]:
        if name not in CHECKS:
            note = f"verify does not know this array; known are {', '.join(CHECKS)}"
            yield Check(name, False, note=note)
            continue
        try:
            yield from CHECKS[name](run, np.asarray(recording[name]), tolerance)
        except ValueError as error:
            yield Check(name, False, note=str(error))
