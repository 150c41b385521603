"""Checks that stored weights are those of a model, and says everything that is wrong at once."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from jet_jax.safetensors_files import TensorSpec

_PLAIN_LINES = 40  # more names than this are folded over their layers


def check_weights(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, TensorSpec],
    source: str,
    model: str,
) -> None:
    """Compares stored weights with those of a model.

    Args:
      expected: shape by name.
      found: shape and dtype by name.
      source: what was read, for the message.
      model: the model that it should be, for the message.

    Raises:
      ValueError: weights are missing, surplus, of another shape or no floating-point numbers; the
        message lists all of them.
    """
    missing = [f"  missing    {name} {list(expected[name])}" for name in expected.keys() - found]
    surplus = [f"  surplus    {name} {list(found[name].shape)}" for name in found.keys() - expected]
    misshapen = [
        f"  misshapen  {name} {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    # numpy does not count bfloat16 among the floating dtypes.
    not_float = [
        f"  not float  {name} {found[name].dtype}"
        for name in expected
        if name in found
        and found[name].dtype.name != "bfloat16"
        and not np.issubdtype(found[name].dtype, np.floating)
    ]
    if not (missing or surplus or misshapen or not_float):
        return
    counts = f"{len(missing)} missing, {len(surplus)} surplus, {len(misshapen)} misshapen"
    lines = fold_layers(
        [*sorted(missing, key=_natural), *sorted(surplus, key=_natural), *misshapen, *not_float]
    )
    raise ValueError(
        f"the weights in {source} are not those of its config ({model}): {counts}. "
        "Check that config and weights belong together.\n" + "\n".join(lines)
    )


def fold_layers(lines: Sequence[str]) -> list[str]:
    """Joins lines that differ only in the layer number, if there are many lines.

    Args:
      lines: at most one `layers.N.` in each.

    Returns:
      The lines; where there are more than 40, those of several layers become one with
      `layers.[0-3,7].` in it.
    """
    if len(lines) <= _PLAIN_LINES:
        return list(lines)
    groups: dict[str, list[int]] = {}
    for line in lines:
        match = re.search(r"\blayers\.(\d+)\.", line)
        key = re.sub(r"\blayers\.\d+\.", "layers.#.", line, count=1)
        groups.setdefault(key, []).extend([int(match[1])] if match else [])
    return [line.replace("layers.#.", f"layers.[{_ranges(n)}].") for line, n in groups.items()]


def _ranges(numbers: list[int]) -> str:
    """Returns `0-3,7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _natural(text: str) -> list:
    """Sorts layer 10 after layer 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
