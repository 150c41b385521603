"""Jet-Nemotron and PostNAS in JAX.

    model = jet_jax.load("path/to/model")
    new = jet_jax.generate(model, [[1, 2, 3]], max_new_tokens=16)

The public names are imported on first use, so `import jet_jax` alone is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jet_jax.config import ModelConfig
    from jet_jax.generation import Generator, generate
    from jet_jax.io import load, save
    from jet_jax.registry import register_mixer

__all__ = ["Generator", "ModelConfig", "generate", "load", "register_mixer", "save"]

# No module may bear a public name: importing it would put the module in the function's place.
_HOMES = {
    "Generator": "jet_jax.generation",
    "ModelConfig": "jet_jax.config",
    "generate": "jet_jax.generation",
    "load": "jet_jax.io",
    "register_mixer": "jet_jax.registry",
    "save": "jet_jax.io",
}


def __getattr__(name: str) -> Any:
    """Imports a public name from its module. Raises AttributeError for any other name."""
    if name not in _HOMES:
        raise AttributeError(f"module 'jet_jax' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
