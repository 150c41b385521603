"""One token of the DPLR rule or of KDA in one kernel: the state is read once, written in place.

With γ = e^g a column of decays, and both products taken of the state as it comes in:

    x = Sᵀ(γ q)    DPLR: u = Sᵀa                            S' = γ S + b uᵀ + k vᵀ
                         o = scale (x + (q·b) u + (q·k) v)
                   KDA:  u = r β (v − r Sᵀ(γ k))            S' = γ S + k uᵀ
                         o = m (x + (q·k) u)

with KDA's factors m = scale / |q| and r = 1 / |k| (m = scale, r = 1 without l2-normalisation). So
nothing waits for the new state. The state is all the traffic, 2·K·V values a head, and everything
small happens here too, since decoding is bound by launches where it is not bound by the state.

Cut as the gated delta rule's step (gated_delta_rule/step_pallas.py), with its blocks: on a GPU a
program takes `v_block` columns of one head's state, K in tiles whose height is a power of two, and
holds them in registers; on a TPU it takes whole states of several heads of one sequence.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from kernels_pallas import backend
from kernels_pallas.gated_delta_rule.blocks import StepBlocks, find_step_blocks
from kernels_pallas.gated_delta_rule.kernel_math import add_up
from kernels_pallas.gated_delta_rule.step_math import row_values
from kernels_pallas.step_state import (
    check_step_supported,
    heads_a_program,
    inside_mask,
    shape_of,
)

Parts = list[jax.Array]


class Token(NamedTuple):
    """A token's arrays; in a kernel references, or one head's values. KDA has β, not a and b."""

    q: Any  # [B, H, K]
    k: Any
    v: Any  # [B, HV, V]
    g: Any  # [B, HV, K]
    a: Any
    b: Any
    beta: Any  # [B, HV]


def step_values(
    tiles: Parts, x: Token, columns: Token, scale: float, use_qk_l2norm: bool
) -> tuple[Parts, jax.Array]:
    """The equations above for some columns of one head, on values.

    Args:
      tiles: the state's rows [K, V] in equal parts, float32.
      x: q, k and b as rows in the same parts, each [part] or [1, part]; v [1, V]; β a scalar or
        [1, 1].
      columns: q, k, a, b and g as columns [part, 1] in the same parts.
      scale: factor on the queries.
      use_qk_l2norm: whether KDA's rows are divided by their norm.

    Returns:
      The new state in the same parts, and o [1, V].
    """

    def read(rows):
        products = add_up(s * c for s, c in zip(tiles, rows, strict=True))
        return jnp.sum(products, axis=0)[None, :]

    decay = [jnp.exp(g) for g in columns.g]
    decayed = [s * c for s, c in zip(tiles, decay, strict=True)]
    read_q = read([c * y for c, y in zip(decay, columns.q, strict=True)])
    if x.a is None:
        m, r, along_k = row_values(x.q, x.k, scale=scale, use_qk_l2norm=use_qk_l2norm)
        error = x.v - r * read([c * y for c, y in zip(decay, columns.k, strict=True)])
        # Selected, not only multiplied: an infinite value must not reach a row that writes nothing.
        u = r * jnp.where(x.beta == 0, 0.0, x.beta * error)
        new = [s + y * u for s, y in zip(decayed, columns.k, strict=True)]
        return new, m * (read_q + along_k * u)
    u = read(columns.a)
    _, _, along_b = row_values(x.q, x.b, scale=1.0, use_qk_l2norm=False)
    _, _, along_k = row_values(x.q, x.k, scale=1.0, use_qk_l2norm=False)
    new = [s + (b * u + k * x.v) for s, b, k in zip(decayed, columns.b, columns.k, strict=True)]
    return new, scale * (read_q + along_b * u + along_k * x.v)


def _gpu_body(refs: Token, s_ref, o_ref, new_ref, *, part: int, width: int, options: dict):
    """One block of columns of one head's state."""
    v_block = s_ref.shape[1]
    inside = functools.partial(inside_mask, start=pl.program_id(2) * v_block, width=width)
    parts = [pl.ds(i, part) for i in range(0, s_ref.shape[0], part)]
    mask = inside((part, v_block))
    tiles = [pltriton.load(s_ref.at[p, :], mask=mask).astype(jnp.float32) for p in parts]

    def rows(ref):
        return None if ref is None else [ref[p].astype(jnp.float32) for p in parts]

    x = Token(*(rows(ref) for ref in refs._replace(v=None, beta=None)))
    columns = Token(*(None if y is None else [p[:, None] for p in y] for y in x))
    beta = None if refs.beta is None else refs.beta[...].astype(jnp.float32)
    v = pltriton.load(refs.v, mask=inside((v_block,))).astype(jnp.float32)[None, :]
    new_tiles, o = step_values(tiles, x._replace(v=v, beta=beta), columns, **options)
    for p, tile in zip(parts, new_tiles, strict=True):
        pltriton.store(new_ref.at[p, :], tile.astype(new_ref.dtype), mask=mask)
    o = jnp.sum(o, axis=0).astype(o_ref.dtype)
    pltriton.store(o_ref, o, mask=inside((v_block,)))


def _tpu_body(refs: Token, s_ref, o_ref, new_ref, *, repeats: int, options: dict):
    """Whole states of several heads of one sequence, one after another."""
    heads, width = s_ref.shape[0], refs.k.shape[-1]
    i, j = (jax.lax.broadcasted_iota(jnp.int32, (width, width), axis) for axis in (0, 1))

    def column(row):
        return jnp.sum(jnp.where(i == j, row, 0.0), axis=1, keepdims=True)

    for h in range(heads):
        of_key = {"q": h // repeats, "k": h // repeats}
        x = {
            name: None if ref is None else [ref[of_key.get(name, h)].astype(jnp.float32)]
            for name, ref in refs._replace(v=None, beta=None)._asdict().items()
        }
        columns = Token(*(None if y is None else [column(y[0])] for y in x.values()))
        beta = None
        if refs.beta is not None:
            head = pl.program_id(1) * heads + h
            at = jax.lax.broadcasted_iota(jnp.int32, refs.beta.shape, 1) == head
            beta = jnp.where(at, refs.beta[...].astype(jnp.float32), 0.0)
            beta = jnp.sum(beta, axis=1, keepdims=True)
        token = Token(**x)._replace(v=refs.v[h].astype(jnp.float32), beta=beta)
        tiles = [s_ref[h].astype(jnp.float32)]
        (tile,), o = step_values(tiles, token, columns, **options)
        new_ref[h] = tile.astype(new_ref.dtype)
        o_ref[h] = o.astype(o_ref.dtype)


def step_in_kernel(
    x: Token,
    state: jax.Array,
    *,
    scale: float,
    use_qk_l2norm: bool = False,
    blocks: StepBlocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Takes one step in one kernel.

    Args:
      x: the token.
      state: [B, HV, K, V], which the kernel writes over where the caller's `jit` donates it.
      scale: factor on the queries.
      use_qk_l2norm: whether KDA's rows are divided by their norm.
      blocks: sizes; None takes the gated delta rule's.

    Returns:
      o [B, HV, V] and the new state.
    """
    check_step_supported(x.q, x.v, state)
    batch, heads, key_width, width = state.shape
    if blocks is None:
        blocks = find_step_blocks(batch * heads, key_width, width, state.dtype)
    options = {"scale": scale, "use_qk_l2norm": use_qk_l2norm}
    call = _on_tpu if backend.platform() == "tpu" else _on_gpu
    return call(x, state, blocks, options)


def _call(body, x: Token, state, specs: Token, o_spec, state_spec, o_shape, grid, warps):
    arrays, treedef = jax.tree.flatten(x)
    return backend.pallas(
        body,
        name="dplr_delta_rule_step" if x.beta is None else "kda_step",
        grid=grid,
        in_specs=[Token(*(None if y is None else s for y, s in zip(x, specs, strict=True)))]
        + [state_spec],
        out_specs=[o_spec, state_spec],
        out_shape=[o_shape, shape_of(state)],
        num_warps=warps,
        aliases={len(arrays): 1},
    )(jax.tree.unflatten(treedef, arrays), state)


def _on_gpu(x: Token, state, blocks: StepBlocks, options):
    batch, heads, key_width, width = state.shape
    repeats, v_block = heads // x.q.shape[1], blocks.v_block

    def shared(b, h, c):
        return (b, h if repeats == 1 else jax.lax.div(h, repeats), 0)

    row = pl.BlockSpec((None, None, key_width), lambda b, h, c: (b, h, 0))
    key = pl.BlockSpec((None, None, key_width), shared)
    value = pl.BlockSpec((None, None, v_block), lambda b, h, c: (b, h, c))
    gate = pl.BlockSpec((None, None), lambda b, h, c: (b, h))
    tile = pl.BlockSpec((None, None, key_width, v_block), lambda b, h, c: (b, h, 0, c))
    part = min(key_width & -key_width, blocks.part)
    o, new = _call(
        functools.partial(_gpu_body, part=part, width=width, options=options),
        x,
        state,
        Token(key, key, value, row, row, row, gate),
        value,
        tile,
        shape_of(x.v),
        (batch, heads, pl.cdiv(width, v_block)),
        blocks.warps,
    )
    return o, new


def _on_tpu(x: Token, state, blocks: StepBlocks, options):
    batch, heads, key_width, width = state.shape
    repeats = heads // x.q.shape[1]
    taken = heads_a_program(state, repeats, blocks.head_bytes)
    shared = max(taken // repeats, 1)

    def key_head(b, h):
        return (b, h if taken >= repeats else jax.lax.div(h * taken, repeats), 0, 0)

    def own(rows, size):
        return pl.BlockSpec((None, taken, rows, size), lambda b, h: (b, h, 0, 0))

    key = pl.BlockSpec((None, shared, 1, key_width), key_head)
    gate = pl.BlockSpec((None, 1, heads), lambda b, h: (b, 0, 0))
    row = own(1, key_width)
    wide = Token(
        *(None if y is None else y[:, :, None] for y in x._replace(beta=None)),
    )._replace(beta=None if x.beta is None else x.beta[:, None])
    o, new = _call(
        functools.partial(_tpu_body, repeats=min(repeats, taken), options=options),
        wide,
        state,
        Token(key, key, own(1, width), row, row, row, gate),
        own(1, width),
        own(key_width, width),
        jax.ShapeDtypeStruct((batch, heads, 1, width), x.v.dtype),
        (batch, heads // taken),
        4,
    )
    return o[:, :, 0], new


def dplr_step_pallas(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    g: Float[Array, "B H K"],
    state: Float[Array, "B H K V"],
    *,
    scale: float,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """Takes one step of the DPLR rule."""
    return step_in_kernel(Token(q, k, v, g, a, b, None), state, scale=float(scale))


def kda_step_pallas(
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B HV V"],
    g: Float[Array, "B HV K"],
    beta: Float[Array, "B HV"],
    state: Float[Array, "B HV K V"],
    *,
    scale: float | None,
    use_qk_l2norm: bool,
) -> tuple[Float[Array, "B HV V"], Float[Array, "B HV K V"]]:
    """Takes one step of Kimi Delta Attention."""
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    token = Token(q, k, v, g, None, None, beta)
    return step_in_kernel(token, state, scale=factor, use_qk_l2norm=use_qk_l2norm)
