"""A linear-attention mixer that starts from a pretrained attention layer.

The projections q, k, v and o are copied, which every published conversion does (MOHAWK, arXiv
2408.10189; RADLADS, 2505.03005; KL-guided layer selection, 2512.20569), short convolutions start as
the identity, and everything else (gates, decays, norms) keeps the start of its own layer. The
output norm and the gate change the scale that o expects, so `refit_output` may then fit it to the
attention's outputs by ridge regression.

Key/value heads are repeated as whole heads: query head j uses head j // (H / N), as in attention.
(The published code of 2512.20569 repeats single rows of the matrix, which mixes the heads up.)

Left behind are rotary embedding and q/k norms, for which the linear path has no place, and biases
where the mixer's projection has none. Rotation that belongs to the block (RetNet) stays, and so do
the activations after its convolutions (SiLU) and its own normalisation of q and k.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jet_jax.config import ModelConfig
from jet_jax.mixer_options import OPTIONS, AttentionOptions
from jet_jax.option_checks import require
from jet_jax.postnas.refit import NormalEquations, output_inputs, refit_output

__all__ = [
    "INITS",
    "MATCHED",
    "STARTS",
    "NormalEquations",
    "copy_projections",
    "from_attention",
    "matched_options",
    "output_inputs",
    "refit_output",
]

INITS = ("random", "copy", "copy_refit")


def matched_options(kind: str, attention: AttentionOptions, hidden_size: int) -> Any:
    """Options of mixer `kind` with the attention's H heads, K and V being its head_dim.

    Everything else is as published, but for the JetBlock's generator_reduction where 8 does not
    divide H·V. RWKV-7's keys are hidden_size / H wide whatever head_dim.

    Raises:
      ValueError: for a kind that was registered without `matched`, or sizes that do not divide.
    """
    known = ", ".join(MATCHED)
    require(kind in MATCHED, f"no options of {kind!r} match an attention's heads; known: {known}")
    options = OPTIONS[kind](**MATCHED[kind](attention, hidden_size))
    options.check(hidden_size)
    return options


def from_attention(
    config: ModelConfig,
    kind: str,
    attention: Mapping[str, Any],
    fresh: Mapping[str, Any],
) -> dict[str, Any]:
    """A linear mixer's weights that start from an attention layer's.

    Heads wider than the attention's keep their fresh values after its channels. A multiple of its
    heads repeats each, and the repeated rows of o are divided by how often. Works under jit, and
    under vmap for layers stacked along a first axis.

    Args:
      config: holds the options of `kind` and of the attention ("attn" or "swa").
      kind: the mixer, built in or registered with a function of its own.
      attention: the weights of `jet_jax.mixers.Attention` as a pure dict: q_proj.kernel [D, H·d],
        k_proj.kernel and v_proj.kernel [D, N·d], o_proj.kernel [H·d, D].
      fresh: newly initialised weights of mixer `kind`, a pure dict.

    Returns:
      A dict of fresh's structure, shapes and dtypes.

    Raises:
      ValueError: the mixer's heads are narrower than the attention's or no multiple of them, the
        attention's weights do not fit the config, or this kind of mixer cannot be started so.
    """
    if kind not in STARTS:
        raise ValueError(
            f'{kind!r} can start "random" only: it was registered without from_attention; those '
            f"that can start from an attention are {', '.join(STARTS)}"
        )
    return STARTS[kind](config, config.options(kind), attention, fresh)


def _teacher(config: ModelConfig, attention: Mapping[str, Any]) -> AttentionOptions:
    """The options that these weights of an attention layer were made with."""
    shapes = [attention[name]["kernel"].shape for name in ("q_proj", "k_proj")]
    for kind in ("attn", "swa"):
        o = dict(config.mixers).get(kind)
        if o is not None and shapes == [
            (config.hidden_size, heads * o.head_dim) for heads in (o.num_heads, o.num_kv_heads)
        ]:
            return o
    raise ValueError(
        f"attention weights with q and k of shapes {shapes[0]} and {shapes[1]} fit no options of "
        f"'attn' or 'swa' in a config of hidden_size={config.hidden_size}; its mixers have: "
        + ", ".join(dict(config.mixers))
    )


def _lay(
    name: str, source: Float[Array, "*R S"], count: int, target: Float[Array, "*R F"], heads: int
) -> Float[Array, "*R F"]:
    """Lays the `count` heads of a row over the `heads` of another, each repeated as a whole."""
    width, room = source.shape[-1] // count, target.shape[-1] // heads
    require(
        heads % count == 0,
        f"{name}: the mixer's {heads} heads are no multiple of the attention's {count}",
    )
    require(
        room >= width,
        f"{name}: the mixer's heads are {room} wide, fewer than the attention's {width} channels",
    )
    given = jnp.repeat(source.reshape(*source.shape[:-1], count, width), heads // count, axis=-2)
    out = target.reshape(*target.shape[:-1], heads, room)
    return out.at[..., :width].set(given.astype(target.dtype)).reshape(target.shape)


def copy_projections(
    config: ModelConfig,
    attention: Mapping[str, Any],
    fresh: Mapping[str, Any],
    heads: tuple[int, int, int],
    query: str = "q_proj",
) -> dict[str, Any]:
    """Copies q, k, v and o, and makes convolutions the identity: the last tap 1, no bias.

    What most mixers start with; the rest of them stays fresh.

    Args:
      config: holds the attention's options.
      attention: as in `from_attention`.
      fresh: weights with q_proj, k_proj, v_proj and o_proj; those of a `ShortConv` are recognised
        by a name that ends in conv1d.
      heads: how many the rows q, k and v have; the output has as many as the largest of them.
      query: the mixer's name of q_proj.

    Returns:
      A dict of fresh's structure, shapes and dtypes.

    Raises:
      ValueError: heads that are narrower than the attention's or no multiple of them.
    """
    o = _teacher(config, attention)
    counts = (o.num_heads, o.num_kv_heads, o.num_kv_heads)
    out = dict(fresh)
    for ours, theirs, count, mine in zip(
        (query, "k_proj", "v_proj"), ("q_proj", "k_proj", "v_proj"), counts, heads, strict=True
    ):
        given = attention[theirs]
        out[ours] = {
            name: _lay(ours, given[name], count, value, mine) if name in given else value
            for name, value in fresh[ours].items()
        }
    outputs = max(heads)
    rows = attention["o_proj"]["kernel"].T * (o.num_heads / outputs)
    kernel = _lay("o_proj", rows, o.num_heads, fresh["o_proj"]["kernel"].T, outputs).T
    out["o_proj"] = {**fresh["o_proj"], "kernel": kernel}
    if "bias" in fresh["o_proj"] and "bias" in attention["o_proj"]:
        bias = fresh["o_proj"]["bias"]
        out["o_proj"]["bias"] = attention["o_proj"]["bias"].astype(bias.dtype)
    return out | {name: _identity(fresh[name]) for name in fresh if name.endswith("conv1d")}


def _identity(conv: Mapping[str, Any]) -> dict[str, Any]:
    """A short convolution's weights that let the current token through."""
    out = jax.tree.map(jnp.zeros_like, dict(conv))
    return out | {"taps": out["taps"].at[-1].set(1)}


def _retention(config: ModelConfig, options: Any, attention: Any, fresh: Any) -> dict[str, Any]:
    """RetNet and GLA, which may have fewer key/value heads themselves."""
    heads = (options.num_heads, options.kv_heads, options.kv_heads)
    return copy_projections(config, attention, fresh, heads)


def _delta(config: ModelConfig, options: Any, attention: Any, fresh: Any) -> dict[str, Any]:
    """The delta rules, some of which may have more value heads."""
    heads = options.num_heads
    values = getattr(options, "value_heads", heads)
    return copy_projections(config, attention, fresh, (heads, heads, values))


def _jet(config: ModelConfig, options: Any, attention: Any, fresh: Any) -> dict[str, Any]:
    """A delta rule whose convolutions may be generated: their constant part is the identity."""
    out = _delta(config, options, attention, fresh)
    for name in options.generators.values():
        constant = jnp.zeros_like(fresh[name]["b2"]).at[-1].set(1)
        out[name] = {**fresh[name], "b2": constant}
    return out


def _rwkv7(config: ModelConfig, options: Any, attention: Any, fresh: Any) -> dict[str, Any]:
    """r, k and v see the current token only: their token shift is a convolution of two taps.

    A layer that is not the first keeps its value residual, fresh as the gates are.
    """
    heads = options.state_shape(config.hidden_size)[0]
    shifts = {name: jnp.zeros_like(fresh[name]) for name in ("x_r", "x_k", "x_v")}
    return copy_projections(config, attention, fresh, (heads,) * 3, "r_proj") | shifts


def _mamba2(config: ModelConfig, options: Any, attention: Any, fresh: Any) -> dict[str, Any]:
    """C from q, B from k and u from v, side by side in one projection: z, u, B, C, δ."""
    inner, _, bc, heads = options.projected(config.hidden_size)
    ends = [inner, 2 * inner, 2 * inner + bc // 2, 2 * inner + bc]
    parts = {name: jnp.split(value, ends, axis=-1) for name, value in fresh["in_proj"].items()}
    places = {"v_proj": 1, "k_proj": 2, "q_proj": 3}
    rows = {row: {name: part[i] for name, part in parts.items()} for row, i in places.items()}
    rows |= {"o_proj": fresh["out_proj"], "conv1d": fresh["conv1d"]}
    rows = copy_projections(config, attention, rows, (options.n_groups, options.n_groups, heads))
    joined = {
        name: jnp.concatenate([z, *(rows[row][name] for row in places), dt], axis=-1)
        for name, (z, *_, dt) in parts.items()
    }
    new = {"in_proj": joined, "out_proj": rows["o_proj"], "conv1d": rows["conv1d"]}
    return {**fresh, **new}


STARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "retnet": _retention,
    "gla": _retention,
    "deltanet": _delta,
    "gdn": _delta,
    "kda": _delta,
    "jet": _jet,
    "mamba2": _mamba2,
    "rwkv7": _rwkv7,
}


def _by_width(attention: AttentionOptions, hidden_size: int) -> dict[str, Any]:
    """Where head widths are fractions of the model's."""
    expand = attention.num_heads * attention.head_dim / hidden_size
    return {"num_heads": attention.num_heads, "expand_k": expand, "expand_v": expand}


def _by_head(attention: AttentionOptions, hidden_size: int) -> dict[str, Any]:
    """Where head widths are given."""
    return {"num_heads": attention.num_heads, "head_dim": attention.head_dim, "expand_v": 1.0}


def _of_jet(attention: AttentionOptions, hidden_size: int) -> dict[str, Any]:
    total = attention.num_heads * attention.head_dim
    reduction = next(r for r in range(8, 0, -1) if total % r == 0)
    return _by_head(attention, hidden_size) | {"generator_reduction": reduction}


def _of_mamba2(attention: AttentionOptions, hidden_size: int) -> dict[str, Any]:
    heads, width = attention.num_heads, attention.head_dim
    expand = heads * width / hidden_size
    return {"head_dim": width, "state_size": width, "n_groups": heads, "expand": expand}


def _of_rwkv7(attention: AttentionOptions, hidden_size: int) -> dict[str, Any]:
    total = attention.num_heads * attention.head_dim
    return {"num_heads": attention.num_heads, "head_dim": None, "value_dim": total}


MATCHED: dict[str, Callable[[AttentionOptions, int], Mapping[str, Any]]] = {
    "retnet": _by_width,
    "gla": _by_width,
    "deltanet": _by_width,
    "gdn": _by_head,
    "kda": _by_head,
    "jet": _of_jet,
    "mamba2": _of_mamba2,
    "rwkv7": _of_rwkv7,
}
