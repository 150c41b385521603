"""The sequence mixers: one class a layer type, all with one signature.

`mixer = MIXERS[kind](config, options, rngs=..., param_dtype=...)`;
`y, state, shared = mixer(x, ctx, state=None)`: without a state it trains on whole rows; with one,
T = 1 decodes and T > 1 prefills a chunk. States are returned, never mutated.
"""

from jet_jax.mixers.attention import Attention
from jet_jax.mixers.jet import JetBlock

MIXERS: dict[str, type] = {"attn": Attention, "swa": Attention, "jet": JetBlock}

__all__ = ["MIXERS", "Attention", "JetBlock"]
