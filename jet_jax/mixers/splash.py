"""Splash attention: JAX's blocked attention kernel for TPUs, for whole rows.

The mask is computed block by block from positions and segment ids, so no [T, T] array exists and
blocks that nothing sees are skipped.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jet_jax.sharding import shard_kernel

_LANES = 128  # T comes in multiples of a TPU register's width; heads are padded to one
_LARGEST_BLOCK = 512


def supports(q: Float[Array, "B T H d"]) -> bool:
    """Whether the kernel is right for these queries: 16-bit, T a multiple of 128.

    Float32 is left to XLA, since the kernel multiplies in bfloat16.
    """
    return q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[1] % _LANES == 0


def splash_attention(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T N d"],
    v: Float[Array, "B T N d"],
    *,
    scale: float,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H d"]:
    """Causal attention of whole rows; arguments as `attend.causal`.

    `interpret` runs the kernel without a TPU, slowly, for tests. Differentiable.
    """
    # The package drags in the whole of Pallas: only a TPU pays for it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, head_dim = q.shape[1], q.shape[3]
    block = next(b for b in (_LARGEST_BLOCK, 256, _LANES) if length % b == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def run(q, k, v, segment_ids):
        heads = q.shape[2]
        one = (
            masks.CausalMask((length, length))
            if window is None
            else masks.LocalMask((length, length), (window - 1, 0), 0)
        )
        kernel = kernels.make_splash_mha(
            masks.MultiHeadMask([one] * heads),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        pad = (-q.shape[3]) % _LANES
        q, k, v = (
            jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, 0), (0, pad)))
            for x in (q * jnp.asarray(scale, q.dtype), k, v)
        )
        y: Any  # the kernel's type covers residuals too, which are not asked for
        if segment_ids is None:
            y = jax.vmap(kernel)(q, k, v)
        else:
            y = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segment_ids, segment_ids))
        return y.swapaxes(1, 2)[..., :head_dim].astype(q.dtype)

    dims = ("bthk", "btnk", "btnk", None if segment_ids is None else "bt")
    return shard_kernel(run, dims, "bthk")(q, k, v, segment_ids)
