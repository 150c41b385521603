"""cuDNN attention with its log-sum-exp in float32: the one place that uses a private call.

`jax.nn.dot_product_attention(return_residual=True)` rounds cuDNN's log-sum-exp to the output's
dtype; in bfloat16 that is an error of about 2⁻⁹ of its size, too much for merging two attentions.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention_with_lse(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B S N d"],
    v: Float[Array, "B S N d"],
    *,
    scale: float,
    lengths: Int[Array, " B"] | None = None,
    is_causal: bool = False,
) -> tuple[Float[Array, "B T H d"], Float[Array, "B T H"]]:
    """Attention and the log of its softmax denominator.

    Args:
      q: queries, bfloat16 or float16.
      k: keys.
      v: values.
      scale: factor on the scores.
      lengths: how many keys of each row are real; needs `is_causal=False`.
      is_causal: hides later keys; needs T = S.

    Returns:
      The output in q's dtype and the log-sum-exp in float32.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    mask_type, q_lengths = MaskType.NO_MASK, None
    if is_causal:
        mask_type = MaskType.CAUSAL
    elif lengths is not None:
        mask_type = MaskType.PADDING
        q_lengths = jnp.full(lengths.shape, q.shape[1], jnp.int32)
    result: Any = dot_product_attention(
        q,
        k.astype(q.dtype),
        v.astype(q.dtype),
        q_seqlen=q_lengths,
        kv_seqlen=lengths,
        scale=scale,
        mask_type=mask_type,
        return_residual=True,
    )
    out, lse = result[:2]
    return out, lse.transpose(0, 2, 1).astype(jnp.float32)
