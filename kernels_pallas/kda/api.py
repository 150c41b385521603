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
from kernels_pallas.dplr.step_pallas import kda_step_pallas
from kernels_pallas.kda.pallas import kda_pallas
from kernels_pallas.kda.reference import kda_reference
from kernels_pallas.kda.step import step_reference, step_xla
from kernels_pallas.kda.xla import kda_xla

CHUNK = {"pallas": kda_pallas, "xla": kda_xla, "reference": kda_reference}
STEP = {"pallas": kda_step_pallas, "xla": step_xla, "reference": step_reference}


def kda(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    g: ArrayLike,
    beta: ArrayLike,
    *,
    scale: float | None = None,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    use_qk_l2norm: bool = False,
    state_dtype: DTypeLike = jnp.float32,
    chunk_size: int = 64,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs Kimi Delta Attention over a sequence.

    Per head, with a state S [K, V] and tokens t = 0, 1, ...:

        S~ = diag(exp(g[t])) S;  delta = beta[t] (v[t] - S~^T k[t]);  S = S~ + k[t] delta^T
        o[t] = scale · S^T q[t]

    (Kimi Team, "Kimi Linear", arXiv:2510.26692, equation 1.) It is the gated delta rule with one
    decay a key channel.

    Differentiable in q, k, v, g, beta and initial_state, through both outputs. Sums are kept in
    float32 whatever the inputs; float32 inputs are multiplied in full float32. With bfloat16 inputs
    "pallas" multiplies bfloat16 operands, "xla" where the state is one of them, "reference" float32
    ones.

    Memory kept for the backward pass: "reference" keeps a state a token (K·V values a head); "xla"
    and "pallas" keep their inputs and `chunk_size` values a token and value head (named
    "kda_inverse" for remat policies; in q's dtype, "xla" in float32), and rebuild one state a
    chunk while the backward pass runs.

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K].
      v: values [B, T, HV, V] of the same dtype; HV is a multiple of H, and value heads
        h·HV/H, h·HV/H + 1, ... use query and key head h.
      g: natural log of the decay [B, T, HV, K], at most 0.
      beta: writing strength [B, T, HV], usually in 0..1.
      scale: factor on the queries; None is 1/sqrt(K).
      initial_state: [B, HV, K, V], the state before the first token; None is zeros.
      segment_ids: [B, T] integers, 0 for padding. The state restarts from zeros at every segment
        (a maximal run of one non-zero id) but the first of the row, which continues
        initial_state. Padding leaves the state untouched, and o is 0 there. Values are not
        checked here: see `validate_segment_ids`.
      use_qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6) per head, in float32.
      state_dtype: dtype of the returned state; inside it is float32.
      chunk_size: tokens a chunk, a power of two from 16 to 256.
      axis_name: mesh axis over which T is split, inside the caller's `shard_map`: every device
        holds the same number of tokens, in order, and the initial state of the first device counts.
        Only "pallas" takes it.
      implementation: "reference" (token by token), "xla" (chunks), "pallas" (kernels for a GPU or
        a TPU, interpreted elsewhere), or None for the fastest that supports the arguments. A named
        one never falls back.

    Returns:
      o [B, T, HV, V] in v's dtype, and the state [B, HV, K, V] after the last real token.

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad chunk_size, an unknown implementation.
      NotImplementedError: no implementation takes the arguments.
    """
    q, k, v, g, beta = (jnp.asarray(x) for x in (q, k, v, g, beta))
    sizes: dict[str, int] = {}
    check_array(sizes, "q", q, "B T H K")
    check_array(sizes, "k", k, "B T H K")
    check_array(sizes, "v", v, "B T HV V")
    check_array(sizes, "g", g, "B T HV K")
    check_array(sizes, "beta", beta, "B T HV")
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        check_array(sizes, "initial_state", initial_state, "B HV K V")
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    check_same_dtype(q=q, k=k, v=v)
    check_heads(sizes)
    check_sequence_options(sizes, segment_ids, chunk_size, state_dtype)
    return dispatch(
        "kda",
        CHUNK,
        implementation,
        q,
        k,
        v,
        g,
        beta,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        use_qk_l2norm=use_qk_l2norm,
        state_dtype=jnp.dtype(state_dtype),
        chunk_size=chunk_size,
        axis_name=axis_name,
    )


def kda_step(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    g: ArrayLike,
    beta: ArrayLike,
    state: ArrayLike,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs Kimi Delta Attention for one token: `kda` with T = 1, without chunks.

    Sums are kept in float32. A row with beta = 0 and g = 0 keeps its state bit for bit: that is
    how finished or empty rows are left alone. "pallas" updates the state where it lies if the
    caller's `jit` donates it, else in a copy. Not differentiable there.

    Args:
      q: queries [B, H, K].
      k: keys [B, H, K].
      v: values [B, HV, V] of the same dtype; HV is a multiple of H.
      g: natural log of the decay [B, HV, K].
      beta: writing strength [B, HV].
      state: [B, HV, K, V], float32 or bfloat16 (float64 under `jax_enable_x64`).
      scale: factor on the queries; None is 1/sqrt(K).
      use_qk_l2norm: divide q and k by sqrt(sum of squares + 1e-6) per head, in float32.
      implementation: "reference", "xla", "pallas" (one kernel for a GPU or a TPU, interpreted
        elsewhere), or None for the fastest that supports the arguments. A named one never
        falls back.

    Returns:
      o [B, HV, V] in v's dtype, and the new state in the state's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation.
      NotImplementedError: no implementation takes the arguments.
    """
    q, k, v, g, beta, state = (jnp.asarray(x) for x in (q, k, v, g, beta, state))
    sizes: dict[str, int] = {}
    check_array(sizes, "q", q, "B H K")
    check_array(sizes, "k", k, "B H K")
    check_array(sizes, "v", v, "B HV V")
    check_array(sizes, "g", g, "B HV K")
    check_array(sizes, "beta", beta, "B HV")
    check_array(sizes, "state", state, "B HV K V")
    check_state_dtype(state)
    check_same_dtype(q=q, k=k, v=v)
    check_heads(sizes)
    return dispatch(
        "kda_step",
        STEP,
        implementation,
        q,
        k,
        v,
        g,
        beta,
        state,
        scale=scale,
        use_qk_l2norm=use_qk_l2norm,
    )
