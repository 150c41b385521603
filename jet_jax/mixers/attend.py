"""Softmax attention by operation and device: libraries everywhere, chosen here.

| operation                 | GPU, bfloat16 / float16               | elsewhere, and float32 |
|---------------------------|---------------------------------------|------------------------|
| training                  | cuDNN, causal, window honoured        | XLA (*)                |
| training, packed rows     | cuDNN with a mask, T <= 8192          | XLA with a mask (*)    |
| prefill chunk over a cache| cuDNN: past + chunk, merged by their  | XLA with a mask        |
|                           | log-sum-exp                           |                        |
| decode                    | cuDNN with key/value lengths          | XLA with a mask        |

(*) On a TPU in 16 bits splash attention takes whole rows, packed or not.

`is_causal` and `local_window_size` of `jax.nn.dot_product_attention` are aligned to the top left
when T != S, so a chunk over a cache never uses them across the two lengths.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jet_jax.cache import KVState, WindowState
from jet_jax.mixers import splash
from jet_jax.mixers.context import Context
from jet_jax.mixers.cudnn import attention_with_lse
from kernels_pallas.backend import platform

MAX_MASKED_LENGTH = 8192  # a [T, T] mask beyond this costs more memory than the attention


def uses_cudnn(q: Float[Array, "B T H d"]) -> bool:
    """Whether cuDNN's fused attention takes these queries: a GPU, 16-bit, head_dim 8 … 256."""
    return (
        platform() == "gpu"
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
    )


def _attention(q, k, v, *, scale, mask=None, is_causal=False, window=None, lengths=None):
    """`jax.nn.dot_product_attention` on the right implementation and at the right precision."""
    local = None if window is None else (window - 1, 0)
    options = {"scale": scale, "mask": mask, "is_causal": is_causal, "local_window_size": local}
    if uses_cudnn(q):
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="cudnn", **options
        )
    precision = "highest" if q.dtype == jnp.float32 else None
    with jax.default_matmul_precision(precision):
        return jax.nn.dot_product_attention(
            q, k, v, key_value_seq_lengths=lengths, implementation="xla", **options
        )


def causal(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T N d"],
    v: Float[Array, "B T N d"],
    *,
    scale: float,
    window: int | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H d"]:
    """Causal attention of whole rows, packed ones included.

    Args:
      q: queries, H a multiple of N.
      k: keys.
      v: values.
      scale: factor on the scores.
      window: the number of keys a token sees, itself included; None for all.
      segment_ids: tokens see only their own segment; padding (0) gets finite, meaningless output.

    Returns:
      The attention output in q's dtype.

    Raises:
      ValueError: for packed rows longer than `MAX_MASKED_LENGTH` on cuDNN.
    """
    if platform() == "tpu" and splash.supports(q):
        return splash.splash_attention(q, k, v, scale=scale, window=window, segment_ids=segment_ids)
    if segment_ids is None:
        return _attention(q, k, v, scale=scale, is_causal=True, window=window)
    length = q.shape[1]
    if uses_cudnn(q) and length > MAX_MASKED_LENGTH:
        raise ValueError(
            f"packed rows of {length} tokens exceed {MAX_MASKED_LENGTH} on a GPU: use shorter "
            "rows, or unpacked ones (segment_ids=None)"
        )
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    visible = (distance >= 0) & (distance < (window or length))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    mask = (visible & same)[:, None]
    return _attention(q, k, v, scale=scale, mask=mask)


def _real(ctx: Context, q: Array) -> Bool[Array, "B T"]:
    """Which tokens of the chunk are not padding."""
    if ctx.segment_ids is None:
        return jnp.ones(q.shape[:2], bool)
    return ctx.segment_ids != 0


def _write(buffer: Array, rows: Array, slots: Int[Array, "B T"]) -> Array:
    """`buffer[b, slots[b, t]] = rows[b, t]`; slots out of range are dropped."""
    index = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[index, slots].set(rows.astype(buffer.dtype), mode="drop")


def cache_step(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T N d"],
    v: Float[Array, "B T N d"],
    state: KVState,
    ctx: Context,
    *,
    scale: float,
) -> tuple[Float[Array, "B T H d"], KVState]:
    """Full attention of a chunk over the cache and itself; T = 1 decodes.

    `ctx.lengths` tokens are cached; padding in the chunk stands at its end and is not written.
    """
    size = state.k.shape[1]
    slots = jnp.where(_real(ctx, q), ctx.positions, size)
    new = KVState(_write(state.k, k, slots), _write(state.v, v, slots))
    if uses_cudnn(q):
        if q.shape[1] == 1:
            # A row that has seen nothing yet still needs one key.
            seen = jnp.maximum(ctx.lengths + _real(ctx, q)[:, 0], 1)
            return _attention(q, new.k, new.v, scale=scale, lengths=seen), new
        return _past_and_chunk(q, k, v, state, ctx.lengths, scale), new
    visible = jnp.arange(size) <= ctx.positions[:, :, None]
    return _attention(q, new.k, new.v, scale=scale, mask=visible[:, None]), new


def _past_and_chunk(q, k, v, state: KVState, lengths, scale: float) -> Array:
    """cuDNN twice, over the cached tokens and over the chunk, merged by log-sum-exp.

    Padding at the chunk's end comes after every real query, so causality hides it.
    """
    past, past_lse = attention_with_lse(
        q, state.k, state.v, scale=scale, lengths=jnp.maximum(lengths, 1)
    )
    past_lse = jnp.where(lengths[:, None, None] > 0, past_lse, -jnp.inf)
    here, here_lse = attention_with_lse(q, k, v, scale=scale, is_causal=True)
    share = jax.nn.sigmoid(past_lse - here_lse)[..., None]  # weight of the past
    merged = jnp.where(share > 0, past.astype(jnp.float32) * share, 0.0)
    return (merged + here.astype(jnp.float32) * (1 - share)).astype(q.dtype)


def window_step(
    q: Float[Array, "B T H d"],
    k: Float[Array, "B T N d"],
    v: Float[Array, "B T N d"],
    state: WindowState,
    ctx: Context,
    *,
    scale: float,
) -> tuple[Float[Array, "B T H d"], WindowState]:
    """Sliding-window attention of a chunk over the ring of cached keys and itself."""
    window = state.k.shape[1]
    real = _real(ctx, q)
    if q.shape[1] == 1:
        slots = jnp.where(real, ctx.positions % window, window)
        new = WindowState(_write(state.k, k, slots), _write(state.v, v, slots))
        # Keys carry their rotation, so their order in the ring does not matter.
        seen = jnp.clip(ctx.lengths + real[:, 0], 1, window)
        return _attention(q, new.k, new.v, scale=scale, lengths=seen), new
    slot = jnp.arange(window)
    newest = ctx.lengths[:, None] - 1
    cached = newest - (newest - slot) % window  # position held by each slot, negative when none
    keys = jnp.concatenate([cached, jnp.where(real, ctx.positions, -1)], axis=1)
    distance = ctx.positions[:, :, None] - keys[:, None, :]
    mask = (distance >= 0) & (distance < window) & (keys >= 0)[:, None, :]
    y = _attention(
        q,
        jnp.concatenate([state.k, k.astype(state.k.dtype)], axis=1),
        jnp.concatenate([state.v, v.astype(state.v.dtype)], axis=1),
        scale=scale,
        mask=mask[:, None],
    )
    # Of a chunk longer than the window only the last w tokens are kept.
    last = ctx.lengths + jnp.sum(real, axis=1)
    kept = real & (ctx.positions >= (last - window)[:, None])
    slots = jnp.where(kept, ctx.positions % window, window)
    return y, WindowState(_write(state.k, k, slots), _write(state.v, v, slots))
