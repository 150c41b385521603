"""The public functions: checks, defaults and the choice of implementation."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from kernels_pallas.checks import (
    check_array,
    check_same_dtype,
    check_sequence_options,
    check_state_dtype,
)
from kernels_pallas.dispatch import dispatch
from kernels_pallas.dplr.pallas import dplr_pallas
from kernels_pallas.dplr.reference import dplr_reference
from kernels_pallas.dplr.step import step_reference, step_xla
from kernels_pallas.dplr.step_pallas import dplr_step_pallas
from kernels_pallas.dplr.xla import dplr_xla

CHUNK = {"pallas": dplr_pallas, "xla": dplr_xla, "reference": dplr_reference}
STEP = {"pallas": dplr_step_pallas, "xla": step_xla, "reference": step_reference}


def dplr_delta_rule(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    g: ArrayLike,
    *,
    scale: float = 1.0,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    state_dtype: DTypeLike = jnp.float32,
    chunk_size: int = 64,
    axis_name: str | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the delta rule with a diagonal plus low-rank transition over a sequence.

    Per head, with a state S [K, V] and tokens t = 0, 1, ...:

        S = diag(exp(g[t])) S + b[t] (a[t]^T S) + k[t] v[t]^T;  o[t] = scale · S^T q[t]

    where a reads the state before its decay. RWKV-7 (arXiv:2503.14456, equation 17) has q = r,
    a = -kappa and b = kappa·a with its normalised removal keys kappa and learning rates a.

    Differentiable in q, k, v, a, b, g and initial_state, through both outputs. Sums are kept in
    float32 whatever the inputs; float32 inputs are multiplied in full float32. With bfloat16 inputs
    "pallas" multiplies bfloat16 operands, "xla" where the state is one of them, "reference" float32
    ones.

    Memory kept for the backward pass: "reference" keeps a state a token (K·V values a head); "xla"
    and "pallas" keep their inputs and `chunk_size` values a token and head (named
    "dplr_delta_rule_inverse" for remat policies; in q's dtype, "xla" in float32), and rebuild one
    state a chunk while the backward pass runs.

    Args:
      q: queries [B, T, H, K].
      k: keys [B, T, H, K].
      v: values [B, T, H, V].
      a: reading vectors [B, T, H, K]: what the state holds along them is written along b.
      b: writing vectors [B, T, H, K]. q, k, v, a and b have the same dtype.
      g: natural log of the decay [B, T, H, K], at most 0.
      scale: factor on the queries.
      initial_state: [B, H, K, V], the state before the first token; None is zeros.
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
        a TPU, interpreted elsewhere), or None for the fastest that supports the arguments. A named
        one never falls back.

    Returns:
      o [B, T, H, V] in v's dtype, and the state [B, H, K, V] after the last real token.

    Raises:
      ValueError: shapes or dtypes that do not fit, a bad chunk_size, an unknown implementation.
      NotImplementedError: no implementation takes the arguments.
    """
    q, k, v, a, b, g = (jnp.asarray(x) for x in (q, k, v, a, b, g))
    sizes: dict[str, int] = {}
    check_array(sizes, "q", q, "B T H K")
    check_array(sizes, "k", k, "B T H K")
    check_array(sizes, "v", v, "B T H V")
    check_array(sizes, "a", a, "B T H K")
    check_array(sizes, "b", b, "B T H K")
    check_array(sizes, "g", g, "B T H K")
    if initial_state is not None:
        initial_state = jnp.asarray(initial_state)
        check_array(sizes, "initial_state", initial_state, "B H K V")
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    check_same_dtype(q=q, k=k, v=v, a=a, b=b)
    check_sequence_options(sizes, segment_ids, chunk_size, state_dtype)
    return dispatch(
        "dplr_delta_rule",
        CHUNK,
        implementation,
        q,
        k,
        v,
        a,
        b,
        g,
        scale=scale,
        initial_state=initial_state,
        segment_ids=segment_ids,
        state_dtype=jnp.dtype(state_dtype),
        chunk_size=chunk_size,
        axis_name=axis_name,
    )


def dplr_delta_rule_step(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    g: ArrayLike,
    state: ArrayLike,
    *,
    scale: float = 1.0,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the rule for one token: `dplr_delta_rule` with T = 1, without chunks.

    Sums are kept in float32. A row with b = 0, k = 0 and g = 0 keeps its state bit for bit: that is
    how finished or empty rows are left alone. "pallas" updates the state where it lies if the
    caller's `jit` donates it, else in a copy. Not differentiable there.

    Args:
      q: queries [B, H, K].
      k: keys [B, H, K].
      v: values [B, H, V].
      a: reading vectors [B, H, K].
      b: writing vectors [B, H, K]. q, k, v, a and b have the same dtype.
      g: natural log of the decay [B, H, K].
      state: [B, H, K, V], float32 or bfloat16 (float64 under `jax_enable_x64`).
      scale: factor on the queries.
      implementation: "reference", "xla", "pallas" (one kernel for a GPU or a TPU, interpreted
        elsewhere), or None for the fastest that supports the arguments. A named one never
        falls back.

    Returns:
      o [B, H, V] in v's dtype, and the new state in the state's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown implementation.
      NotImplementedError: no implementation takes the arguments.
    """
    q, k, v, a, b, g, state = (jnp.asarray(x) for x in (q, k, v, a, b, g, state))
    sizes: dict[str, int] = {}
    check_array(sizes, "q", q, "B H K")
    check_array(sizes, "k", k, "B H K")
    check_array(sizes, "v", v, "B H V")
    check_array(sizes, "a", a, "B H K")
    check_array(sizes, "b", b, "B H K")
    check_array(sizes, "g", g, "B H K")
    check_array(sizes, "state", state, "B H K V")
    check_state_dtype(state)
    check_same_dtype(q=q, k=k, v=v, a=a, b=b)
    return dispatch(
        "dplr_delta_rule_step",
        STEP,
        implementation,
        q,
        k,
        v,
        a,
        b,
        g,
        state,
        scale=scale,
    )
