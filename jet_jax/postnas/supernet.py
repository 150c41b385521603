"""The once-for-all network: in every layer the pretrained attention beside a linear path.

Embedding, norms, MLPs and head are the teacher's own arrays, held once and never trained; so is its
attention unless it trains too. Layers are stacked, and one scan runs them with a `switch` over a
traced path, so that one program serves the teacher and every hybrid.

    net = Supernet.of(teacher_config, "gla", options)
    params = {"teacher": stack(teacher_weights), "linear": ...}       # [L, ...] a weight
    hidden, _ = net.run(params, path, tokens, segment_ids)

Source: arXiv 2508.15884 §2.2 (PostNAS); what it leaves open is said where it is decided.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jet_jax import sharding
from jet_jax.config import ModelConfig
from jet_jax.mixers import MIXERS
from jet_jax.mixers.context import Context, Place
from jet_jax.models.block import Block
from jet_jax.models.lm import HybridLM
from jet_jax.params import split
from jet_jax.postnas.paths import LINEAR, WINDOW
from jet_jax.postnas.switch import switch
from jet_jax.sharding import constrain, tensor_shards
from jet_jax.step import cast_params
from kernels_pallas import segment_positions

SOFTMAX = ("attn", "swa")
STACKED = ("layers", "linear", "full")  # keys below which every array has a leading axis of layers
# What the backward pass computes again. "mixer": norms, and mixers but for their outputs; the MLPs'
# two inner products are kept, 4 F bytes a token and layer in bfloat16 for an MLP of width F.
# "layer": the MLPs too.
REMATS = ("mixer", "layer")
MIXED = "mixed"  # name of a mixer's output, which is always kept


@dataclass(frozen=True)
class Supernet:
    """The structure; its weights are a nested dict `{"teacher", "linear"[, "full"]}`.

    `teacher` is a model's weights with `layers` stacked; `linear` the stacked weights of the linear
    mixers; `full` a copy of the teacher's attention, only where that trains.

    Attributes:
      config: the teacher, with the options of the linear kind (and of "swa") beside its own.
      kind: layer type of the linear path.
    """

    config: ModelConfig
    kind: str

    @classmethod
    def of(
        cls, teacher: ModelConfig, kind: str, options: Any, window: int | None = None
    ) -> Supernet:
        """Builds the structure for a teacher.

        Args:
          teacher: a model of softmax attention alone ("attn", "swa").
          kind: layer type of the linear path, of `MIXERS`.
          options: its options, a mapping or the dataclass.
          window: tokens that a windowed layer sees; by default what the teacher's "swa" has.

        Raises:
          ValueError: the teacher or the kind is not supported; the message says why.
        """
        check_teacher(teacher)
        if kind in SOFTMAX or kind not in MIXERS:
            known = ", ".join(k for k in MIXERS if k not in (*SOFTMAX, "rwkv7"))
            raise ValueError(f"{kind!r} is no linear path for a supernet; use one of {known}")
        if kind == "rwkv7":
            raise ValueError(
                "rwkv7 is no linear path for a supernet: its layers read the values of the first "
                "of them, and which that is changes with the path; compare it as a block instead"
            )
        mixers = dict(teacher.mixers)
        attention = mixers.get("attn") or mixers["swa"]
        mixers["attn"] = _windowed(attention, None)
        own = mixers["swa"].window_size if "swa" in teacher.layer_types else None
        if window is not None and own is not None and window != own:
            raise ValueError(f"window={window}, but the teacher's own windows see {own} tokens")
        mixers.pop("swa", None)
        if window or own:
            mixers["swa"] = _windowed(attention, window or own)
        mixers[kind] = options
        return cls(teacher.replace(mixers=mixers), kind)

    @property
    def num_layers(self) -> int:
        """Number of layers L."""
        return self.config.num_layers

    @cached_property
    def teacher_path(self) -> np.ndarray:
        """The path that is the teacher, int32 [L]."""
        return np.array([WINDOW * (k == "swa") for k in self.config.layer_types], np.int32)

    @property
    def has_window(self) -> bool:
        """Whether layers may take a sliding window."""
        return any(kind == "swa" for kind, _ in self.config.mixers)

    def hybrid(self, path: Any) -> ModelConfig:
        """The config of the hybrid that a path stands for.

        Raises:
          ValueError: the path has another length, or windows that this supernet does not have.
        """
        path = np.asarray(path)
        if path.shape != (self.num_layers,):
            raise ValueError(f"a path of shape {path.shape} for {self.num_layers} layers")
        if (path == WINDOW).any() and not self.has_window:
            raise ValueError("the path has windowed layers; give the supernet a window")
        kinds = tuple(("attn", self.kind, "swa")[choice] for choice in path)
        used = {kind: options for kind, options in self.config.mixers if kind in kinds}
        return self.config.replace(layer_types=kinds, mixers=used, hf_json=None)

    # ---- weights ------------------------------------------------------------------------------

    def random_linear(self, key: Array) -> dict[str, Any]:
        """The linear paths' weights by their kind's own initialisation: float32, stacked."""

        def one(key, index):
            return split(self._mixer(self.kind, Place(index, False), nnx.Rngs(key)))[1]

        keys = jax.random.split(key, self.num_layers)
        return jax.vmap(one)(keys, jnp.arange(self.num_layers))

    def extract(self, params: Mapping[str, Any], path: Any) -> dict[str, Any]:
        """The weights of the hybrid that a path stands for, layer by layer.

        Args:
          params: the supernet's.
          path: int [L], known values.

        Returns:
          Nested weights of a `HybridLM` of `hybrid(path)`; the arrays' dtypes are kept.
        """
        teacher = params["teacher"]
        full = params.get("full", teacher["layers"]["mixer"])
        layers = {}
        for i, choice in enumerate(np.asarray(path)):
            layers[i] = jax.tree.map(lambda x, i=i: x[i], dict(teacher["layers"]))
            mixers = params["linear"] if choice == LINEAR else full
            layers[i]["mixer"] = jax.tree.map(lambda x, i=i: x[i], mixers)
        return {**{k: v for k, v in teacher.items() if k != "layers"}, "layers": layers}

    # ---- structure ----------------------------------------------------------------------------

    def _mixer(self, kind: str, place: Place, rngs: nnx.Rngs) -> nnx.Module:
        return MIXERS[kind](self.config, self.config.options(kind), rngs=rngs, place=place)

    @cached_property
    def _structures(self) -> dict[str, Any]:
        """Static descriptions of the mixers, of a layer and of what is outside of the layers."""
        kinds = [k for k in ("attn", self.kind, "swa") if k != "swa" or self.has_window]
        place = Place(1, False)
        make = {k: lambda k=k: self._mixer(k, place, nnx.Rngs(0)) for k in kinds}
        make["layer"] = lambda: Block(self.config, "attn", rngs=nnx.Rngs(0))
        one = self.config.replace(layer_types=("attn",))
        make["model"] = lambda: HybridLM(one, rngs=nnx.Rngs(0))
        return {name: nnx.graphdef(nnx.eval_shape(function)) for name, function in make.items()}

    def structure(self, kind: str) -> Any:
        """The static description of the mixer of a kind."""
        return self._structures[kind]

    def mix(
        self, choice: Any, weights: Mapping[str, Any], h: Float[Array, "B T D"], ctx: Context
    ) -> Float[Array, "B T D"]:
        """One layer's mixer, whichever the path takes.

        Args:
          choice: FULL, LINEAR or WINDOW; traced, or an int.
          weights: of one layer, `{"linear", "full"}`.
          h: the layer's normalised input.
          ctx: segments and positions.
        """

        def branch(kind, part):
            def run(operands):
                weights, h, ctx = operands
                mixer = nnx.merge(self._structures[kind], weights[part])
                return constrain(mixer(constrain(h, "btd"), ctx)[0], "btd")

            return run

        branches = [branch("attn", "full"), branch(self.kind, "linear")]
        if self.has_window:
            branches.append(branch("swa", "full"))
        operands = weights, h, ctx
        if isinstance(choice, int):
            return branches[choice](operands)
        if tensor_shards() == 1:
            mixers = {part: weights[part] for part in ("linear", "full")}
            return switch(tuple(branches), choice, (mixers, h, ctx))
        # Split over heads too, a conditional's derivative comes out wrong (jax 0.11.2, seen on a
        # mesh of 2 x 2 x 2 with one row a device), so there every branch is computed.
        return jax.lax.select_n(choice, *(run(operands) for run in branches))

    def layer(self, weights: Mapping[str, Any]) -> Block:
        """A layer's norms and MLP (and the teacher's mixer) as a module."""
        return nnx.merge(self._structures["layer"], weights["layer"])

    def per_layer(self, params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
        """Stacked weights as a scan takes them, in the compute dtype."""
        layers = params["teacher"]["layers"]
        full = params.get("full", layers["mixer"])
        parts = {"layer": layers, "full": full, "linear": params["linear"]}
        return cast_params(parts, dtype)

    # ---- running ------------------------------------------------------------------------------

    def context(self, tokens: Int[Array, "B T"], segment_ids: Any, positions: Any) -> Context:
        """What the mixers are told; positions follow from the segments where they are None."""
        if positions is None and segment_ids is not None:
            positions = segment_positions(segment_ids)
        elif positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
            positions = jnp.broadcast_to(positions, tokens.shape)
        return Context(segment_ids, positions)

    def embed(self, params: Mapping[str, Any], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The layers' first input."""
        x = jnp.take(params["teacher"]["embed_tokens"]["embedding"], tokens, axis=0)
        x = x.astype(jnp.dtype(self.config.dtype))
        if self.config.embedding_scale:
            x = x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)
        return constrain(x, "btd")

    def run(
        self,
        params: Mapping[str, Any],
        path: Int[Array, " L"],
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
        *,
        each: Any = None,
        targets: Any = None,
        remat: str = "mixer",
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Runs the network along a path.

        Args:
          params: the supernet's weights.
          path: int32 [L], may be traced.
          tokens: ids.
          segment_ids: as in `HybridLM.forward`.
          positions: as there.
          each: function of a mixer's output [B, T, D] and the layer's entry of `targets`, whose
            results are stacked over layers; None for none.
          targets: array or tree with a leading axis of layers.
          remat: what the backward pass computes again, of `REMATS`.

        Returns:
          The output of the final norm, [B, T, D], and the stacked results [L, ...].

        Raises:
          ValueError: another `remat`.
        """
        if remat not in REMATS:
            raise ValueError(f"unknown remat {remat!r} for a supernet; known: {', '.join(REMATS)}")
        ctx = self.context(tokens, segment_ids, positions)
        weights = self.per_layer(params, jnp.dtype(self.config.dtype))

        def mixer(x, choice, weights, target):
            h = self.layer(weights).input_layernorm(x)
            mixed = checkpoint_name(self.mix(choice, weights, h, ctx), MIXED)
            return x + mixed, None if each is None else each(mixed, target)

        def mlp(x, weights):
            block = self.layer(weights)
            return constrain(x + block.mlp(block.post_attention_layernorm(x)), "btd")

        # In a scan the compiler cannot merge the two computations anyway.
        checkpoint = partial(jax.checkpoint, prevent_cse=False)
        policies = jax.checkpoint_policies
        keep_mixed = policies.save_only_these_names(MIXED)
        if remat == "mixer":
            mixer = checkpoint(mixer, policy=keep_mixed)
            mlp = checkpoint(mlp, policy=policies.dots_with_no_batch_dims_saveable)

        def layer(x, xs):
            choice, weights, target = xs
            x, result = mixer(x, choice, weights, target)
            return mlp(x, weights), result

        if remat == "layer":
            layer = checkpoint(layer, policy=keep_mixed)
        xs = (jnp.asarray(path), weights, targets)
        x, results = jax.lax.scan(layer, self.embed(params, tokens), xs)
        return self._outside(params).norm(x), results

    def head_kernel(self, params: Mapping[str, Any]) -> Float[Array, "D E"]:
        """The head's matrix, the teacher's."""
        return self._outside(params).head_kernel()

    def _outside(self, params: Mapping[str, Any]) -> HybridLM:
        """The teacher with its first layer only, for what is outside of the layers."""
        teacher = params["teacher"]
        first = jax.tree.map(lambda x: x[0], teacher["layers"])
        return nnx.merge(self._structures["model"], {**teacher, "layers": {0: first}})


def check_teacher(config: ModelConfig) -> None:
    """Raises ValueError, naming the reason, for a teacher whose layers cannot be stacked."""
    other = sorted(set(config.layer_types) - set(SOFTMAX))
    if other:
        raise ValueError(
            f"the teacher has layers of type {', '.join(other)}; a supernet starts from a model "
            "whose layers are all softmax attention"
        )
    if config.use_post_norms:
        raise ValueError(
            "the teacher normalises its branches again before they are added (Gemma 3); the "
            "supernet does not support that"
        )
    if len(set(config.layer_types)) == 2:
        full, window = (config.options(kind) for kind in SOFTMAX)
        if _windowed(window, None) != full:
            raise ValueError(
                "the teacher's full and windowed layers differ in more than the window (as Gemma "
                "3's do): their weights do not serve each other, so they cannot be stacked"
            )


def _windowed(options: Any, window: int | None) -> Any:
    return dataclasses.replace(options, window_size=window)


def stack(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A model's nested weights with its layers stacked: `layers` {0: tree, ...} -> one tree."""
    layers = [weights["layers"][i] for i in sorted(weights["layers"])]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    return {**{k: v for k, v in weights.items() if k != "layers"}, "layers": stacked}


def shardings(tree: Any, mesh: Any) -> Any:
    """As `sharding.shardings`, for weights or optimizer state with stacked layers.

    What lies below one of `STACKED` is placed as one layer's array, its leading axis whole.
    """

    def one(path, x):
        name = sharding.dotted(path)
        if not set(STACKED) & set(name.split(".")) or x.ndim == 0:
            spec = sharding.placement(name, x.shape, mesh).spec
        else:
            spec = sharding.P(None, *sharding.placement(name, x.shape[1:], mesh).spec)
        return jax.NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)
