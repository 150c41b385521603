"""The public functions: checks, defaults and the choice of implementation."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from kernels_pallas.checks import (
    check_array,
    check_heads,
    check_same_dtype,
    check_sequence_options,
    check_state_dtype,
)
from kernels_pallas.dispatch import dispatch
from kernels_pallas.linear_attention.pallas import linear_attention_pallas
from kernels_pallas.linear_attention.reference import linear_attention_reference
from kernels_pallas.linear_attention.step import step_reference, step_xla
from kernels_pallas.linear_attention.step_pallas import step_pallas
from kernels_pallas.linear_attention.xla import linear_attention_xla

CHUNK = {
    "pallas": linear_attention_pallas,
    "xla": linear_attention_xla,
    "reference": linear_attention_reference,
}
STEP = {"pallas": step_pallas, "xla": step_xla, "reference": step_reference}


def _check_decay(sizes: dict[str, int], g: jax.Array, row: str) -> None:
    """Checks log decays, one a head or one a key channel.

    Args:
      sizes: sizes known so far.
      g: the log decays.
      row: dimension names of one decay a head.
    """
    of_head = row.split()
    if g.ndim not in (len(of_head), len(of_head) + 1):
        known = ", ".join(f"{dim}={sizes[dim]}" for dim in of_head)
        raise ValueError(
            f"g has shape {tuple(g.shape)}, expected [{known}] for one decay a head or "
            f"[{known}, K={sizes['K']}] for one a key channel"
        )
    check_array(sizes, "g", g, row if g.ndim == len(of_head) else f"{row} K")


def linear_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    g: ArrayLike | None,
    *,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    state_dtype: DTypeLike = jnp.float32,
    chunk_size: int = 64,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs linear attention with decay over a sequence.

    Per head, with a state S [K, V] and tokens t = 0, 1, ...:

        S = diag(exp(g[t])) S + k[t] v[t]^T;  o[t] = scale · S^T q[t]

    where g[t] is one number a head (retention, arXiv:2307.08621, equation 1, and Mamba2,
    arXiv:2405.21060, section 7.1: keys B, queries C, values dt·x) or one a key channel (gated
    linear attention, arXiv:2312.06635, equation 3).

    Differentiable in q, k, v, g and initial_state, through both outputs. Sums are kept in float32
    whatever the inputs; float32 inputs are multiplied in full float32. With bfloat16 inputs "xla"
    and "pallas" multiply bfloat16 operands; "reference" multiplies in float32.

    Memory kept for the backward pass: "reference" keeps a state a token (K·V values a head);
    "xla" and "pallas" keep their inputs alone, and rebuild one state a chunk (K·V / chunk_size
    values a token and head) while the backward pass runs.

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K].
      v: values [B, T, HV, V] of the same dtype; HV is a multiple of H, and value heads
        h·HV/H, h·HV/H + 1, ... use query and key head h.
      g: natural log of the decay, at most 0: [B, T, HV], or [B, T, HV, K] for one a key channel;
        None is no decay.
      scale: factor on the queries; None is 1/sqrt(K).
      initial_state: [B, HV, K, V], the state before the first token; None is zeros.
      segment_ids: [B, T] integers, 0 for padding. The state restarts from zeros at every segment
        (a maximal run of one non-zero id) but the first of the row, which continues
        initial_state. Padding leaves the state untouched, and o is 0 there. Values are not
        checked here: see `validate_segment_ids`.
      state_dtype: dtype of the returned state; inside it is float32.
      chunk_size: tokens a chunk, a power of two from 16 to 256.
      axis_name: mesh axis over which T is split, inside the caller's `shard_map`: every device
        holds the same number of tokens, in order, and the initial state of the first device counts.
        Only "pallas" takes it.
      implementation: "reference" (token by token), "xla" (chunks), "pallas" (kernels for a GPU or
        a TPU, interpreted elsewhere), or None for the fastest that supports the arguments. A
        named one never falls back.

    Returns:
      o [B, T, HV, V] in v's dtype, and the state [B, HV, K, V] after the last real token (with
      `axis_name` of the last device's part, on every device).

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad chunk_size, an unknown implementation.
      NotImplementedError: no implementation takes the arguments.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    sizes: dict[str, int] = {}
    check_array(sizes, "q", q, "B T H K")
    check_array(sizes, "k", k, "B T H K")
    check_array(sizes, "v", v, "B T HV V")
    if g is not None:
        g = jnp.asarray(g)
        _check_decay(sizes, g, "B T HV")
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        check_array(sizes, "initial_state", initial_state, "B HV K V")
    check_same_dtype(q=q, k=k, v=v)
    check_heads(sizes)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    check_sequence_options(sizes, segment_ids, chunk_size, state_dtype)
    return dispatch(
        "linear_attention",
        CHUNK,
        implementation,
        q,
        k,
        v,
        g,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        state_dtype=jnp.dtype(state_dtype),
        chunk_size=chunk_size,
        axis_name=axis_name,
    )


def linear_attention_step(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    g: ArrayLike | None,
    state: ArrayLike,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs linear attention for one token: `linear_attention` with T = 1, without chunks.

    Sums are kept in float32. A row with v = 0 and g = 0 keeps its state bit for bit: that is how
    finished or empty rows are left alone. "pallas" updates the state where it lies if the caller's
    `jit` donates it, else in a copy. Not differentiable there.

    Args:
      q: queries [B, H, K].
      k: keys [B, H, K].
      v: values [B, HV, V] of the same dtype; HV is a multiple of H.
      g: natural log of the decay [B, HV] or [B, HV, K]; None is no decay.
      state: [B, HV, K, V], float32 or bfloat16 (float64 under `jax_enable_x64`).
      scale: factor on the queries; None is 1/sqrt(K).
      implementation: "reference", "xla", "pallas" (one kernel for a GPU or a TPU, interpreted
        elsewhere), or None for the fastest that supports the arguments. A named one never
        falls back.

    Returns:
      o [B, HV, V] in v's dtype, and the new state in the state's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation.
      NotImplementedError: no implementation takes the arguments.
    """
    q, k, v, state = (jnp.asarray(x) for x in (q, k, v, state))
    sizes: dict[str, int] = {}
    check_array(sizes, "q", q, "B H K")
    check_array(sizes, "k", k, "B H K")
    check_array(sizes, "v", v, "B HV V")
    if g is not None:
        g = jnp.asarray(g)
        _check_decay(sizes, g, "B HV")
    check_array(sizes, "state", state, "B HV K V")
    check_state_dtype(state)
    check_same_dtype(q=q, k=k, v=v)
    check_heads(sizes)
    return dispatch(
        "linear_attention_step",
        STEP,
        implementation,
        q,
        k,
        v,
        g,
        state,
        scale=scale,
    )
