"""The sequence mixers: one class a layer type, all with one signature.

`mixer = MIXERS[kind](config, options, rngs=..., param_dtype=..., place=...)`;
`y, state, shared = mixer(x, ctx, state=None)`: without a state it trains on whole rows; with one,
T = 1 decodes and T > 1 prefills a chunk. States are returned, never mutated.
"""

from jet_jax.mixers.attention import Attention
from jet_jax.mixers.deltanet import DeltaNet
from jet_jax.mixers.gdn import GatedDeltaNet
from jet_jax.mixers.gla import GatedLinearAttention
from jet_jax.mixers.jet import JetBlock
from jet_jax.mixers.kda import KimiDeltaAttention
from jet_jax.mixers.mamba2 import Mamba2
from jet_jax.mixers.retnet import MultiScaleRetention
from jet_jax.mixers.rwkv7 import RWKV7

MIXERS: dict[str, type] = {
    "attn": Attention,
    "swa": Attention,
    "jet": JetBlock,
    "retnet": MultiScaleRetention,
    "gla": GatedLinearAttention,
    "deltanet": DeltaNet,
    "gdn": GatedDeltaNet,
    "mamba2": Mamba2,
    "rwkv7": RWKV7,
    "kda": KimiDeltaAttention,
}

__all__ = [
    "MIXERS",
    "RWKV7",
    "Attention",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "JetBlock",
    "KimiDeltaAttention",
    "Mamba2",
    "MultiScaleRetention",
]
