"""The open door: a block of the user's own becomes a layer type, everywhere at once.

    jet_jax.register_mixer("mine", MyBlock, MyOptions)

Configs, models, generation, training, the supernet and comparisons then know "mine" as they know
"gla". docs/own_block.md is a whole example.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jet_jax.cache import STATES, RecurrentState
from jet_jax.mixer_options import OPTIONS, AttentionOptions
from jet_jax.mixers import MIXERS
from jet_jax.option_checks import MixerOptions, require
from jet_jax.postnas.inherit import MATCHED, STARTS
from jet_jax.recurrent_options import RecurrentOptions

COUNTS = ("check", "param_count", "matmul_params", "cache_bytes", "mixing_flops")
RECURRENT = ("state_shape", "tails", "matmul_params", "vector_params")

_own: dict[str, tuple[str, str]] = {}  # kind → module and name of the class


def register_mixer(
    kind: str,
    mixer_class: type,
    options_class: type,
    *,
    from_attention: Callable[..., dict[str, Any]] | None = None,
    matched: Callable[[AttentionOptions, int], Mapping[str, Any]] | None = None,
    state: Any = RecurrentState,
) -> None:
    """Makes a block a layer type. Registering a class again replaces what it was registered with.

    Args:
      kind: the layer type's name in configs; lower-case letters, digits and _.
      mixer_class: an `nnx.Module` with `__init__(config, options, *, rngs, param_dtype, place)` and
        `__call__(x, ctx, state=None) -> (y, state, shared)`; `jet_jax.mixers` tells the contract.
      options_class: a frozen dataclass derived from `option_checks.MixerOptions`, or for a mixer
        that keeps a matrix a head from `recurrent_options.RecurrentOptions`, which counts the rest.
      from_attention: `(config, options, attention, fresh) -> weights`, a start from a pretrained
        attention layer, see `postnas.inherit.from_attention`. Without one the block starts
        "random" only.
      matched: `(attention options, hidden_size) -> options`, those with the attention's heads.
        Without it the options must be given in full wherever they would follow from a teacher.
      state: what decoding keeps, a class with `init` as in `jet_jax.cache`.

    Raises:
      ValueError: the name is taken, or a class or function does not fit; it says what is missing.
    """
    known = ", ".join(MIXERS)
    require(
        kind.isidentifier() and kind == kind.lower(),
        f"kind={kind!r} names a layer type: use lower-case letters, digits and _ alone",
    )
    name = (mixer_class.__module__, mixer_class.__qualname__)
    require(
        _own.get(kind, name) == name and (kind in _own or kind not in MIXERS),
        f"layer type {kind!r} is taken by {MIXERS.get(kind)}; choose another name than {known}",
    )
    what = f"{kind!r}: {mixer_class.__name__}"
    _require_call(f"{what}.__init__", mixer_class.__init__, 3, ("rngs", "param_dtype", "place"))
    for count in (3, 4):  # without and with a state
        _require_call(f"{what}.__call__", mixer_class.__call__, count)
    _check_options(kind, options_class, state)
    if from_attention is not None:
        _require_call(f"{kind!r}: from_attention", from_attention, 4)
    if matched is not None:
        _require_call(f"{kind!r}: matched", matched, 2)
    _own[kind] = name
    MIXERS[kind], OPTIONS[kind], STATES[kind] = mixer_class, options_class, state
    STARTS.pop(kind, None)
    MATCHED.pop(kind, None)
    if from_attention is not None:
        STARTS[kind] = from_attention
    if matched is not None:
        MATCHED[kind] = matched


def _require_call(what: str, function: Any, count: int, names: tuple[str, ...] = ()) -> None:
    """Raises ValueError unless a function takes that many arguments in order, and those names."""
    try:
        inspect.signature(function).bind(*range(count), **dict.fromkeys(names))
    except TypeError as error:
        raise ValueError(
            f"{what}{inspect.signature(function)} cannot be called with {count} arguments in order"
            + (f" and {', '.join(names)} by name" if names else "")
            + f": {error}"
        ) from error


def _check_options(kind: str, options_class: type, state: Any) -> None:
    """Raises ValueError unless a class can be a layer type's options, with that state."""
    what = f"{kind!r}: {options_class.__name__}"
    require(
        dataclasses.is_dataclass(options_class)
        and getattr(options_class, "__dataclass_params__").frozen,  # noqa: B009
        f"{what} must be a frozen dataclass, since configs are compared and hashed",
    )
    require(
        issubclass(options_class, MixerOptions),
        f"{what} must derive from MixerOptions of jet_jax.option_checks, or RecurrentOptions of "
        "jet_jax.recurrent_options",
    )
    recurrent = issubclass(options_class, RecurrentOptions)
    missing = [name for name in COUNTS if not callable(getattr(options_class, name, None))]
    if recurrent:
        missing += [
            name
            for name in RECURRENT
            if getattr(options_class, name) is getattr(RecurrentOptions, name)
        ]
    require(not missing, f"{what} lacks the methods {', '.join(missing)}")
    require(
        recurrent or state is not RecurrentState,
        f"{what} does not derive from RecurrentOptions; give state=, a class with init as in "
        "jet_jax.cache",
    )
    require(callable(getattr(state, "init", None)), f"{kind!r}: state {state} has no init")
