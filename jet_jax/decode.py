"""Generation on the device: empty cache, admission, prefill of a chunk, decoding of a block.

All functions see B lanes. A lane holds one request at a time; a lane that holds none, or whose
request waits, passes padding, which leaves its cache untouched. The cache has a fixed shape and is
donated to each call, so it stays where it is.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from jet_jax.cache import Cache, KVState, RecurrentState, WindowState, init_cache
from jet_jax.config import ModelConfig
from jet_jax.sampling import Sampling, sample
from jet_jax.sharding import constrain

NO_TOKEN = -1  # what a lane without a request emits

_STATE_DIMS = {
    KVState: {"k": "bsnk", "v": "bsnk"},
    WindowState: {"k": "bsnk", "v": "bsnk"},
    # Rows of channels are split as heads are; all heads share B and C, and the token shift is
    # taken before the heads.
    RecurrentState: {
        "rows": {"q": "bth", "k": "bth", "v": "bth", "x": "bth", "bc": "btd", "shift": "btd"},
        "recurrent": "bhkv",
    },
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lanes:
    """What each lane does next; all int32 [B].

    Attributes:
      token: the request's newest token, which the cache has not seen yet.
      remaining: how many tokens may still be emitted; 0 means that the lane is idle.
      request: the request's number, for its random numbers.
    """

    token: Any
    remaining: Any
    request: Any


def _pin(cache: Cache) -> Cache:
    """Holds the cache in one sharding under a mesh: rows over the batch axes, heads over tensor.

    Were it left to the compiler, the layout could differ from call to call, and each new one
    would compile everything again.
    """

    def held(x: Any, dims: Any) -> Any:
        if isinstance(x, dict):
            return {name: held(part, (dims or {}).get(name)) for name, part in x.items()}
        return constrain(x, dims or "b" + "t" * (x.ndim - 1))

    def pin(state: Any) -> Any:
        dims = _STATE_DIMS.get(type(state), {})
        arrays = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        return type(state)(**held(arrays, dims))

    return Cache(tuple(pin(state) for state in cache.layers), constrain(cache.length, "b"))


def _pin_lanes(lanes: Lanes) -> Lanes:
    return jax.tree.map(lambda x: constrain(x, "t"), lanes)  # whole on every device


class DeviceFunctions:
    """The compiled functions of one model structure; weights are an argument of each call.

    Args:
      graphdef: the model's static description, from `jet_jax.params.split`.
      config: the model's config.
    """

    def __init__(self, graphdef: Any, config: ModelConfig):
        self.graphdef, self.config = graphdef, config
        self.start = jax.jit(self._start, static_argnames=("lanes", "max_length"))
        self.admit = jax.jit(self._admit, donate_argnames=("cache", "lanes"))
        self.prefill = jax.jit(self._prefill, donate_argnames="cache")
        self.decode = jax.jit(
            self._decode, donate_argnames=("cache", "lanes"), static_argnames="steps"
        )

    def _start(self, lanes: int, max_length: int) -> tuple[Cache, Lanes]:
        """An empty cache and idle lanes."""
        cache = init_cache(self.config, lanes, max_length)
        return _pin(cache), _pin_lanes(Lanes(*(jnp.zeros(lanes, jnp.int32) for _ in range(3))))

    def _admit(
        self, cache: Cache, lanes: Lanes, fresh: Bool[Array, " B"], new: Lanes
    ) -> tuple[Cache, Lanes]:
        """Empties the cache rows of `fresh` lanes and gives these lanes what `new` says."""

        def clear(x: Array) -> Array:
            return jnp.where(fresh.reshape(-1, *(1,) * (x.ndim - 1)), jnp.zeros_like(x), x)

        # Stale keys and values lie beyond the row's length, where nothing looks at them: clearing
        # them would move the whole cache through memory.
        layers = tuple(
            state if isinstance(state, KVState | WindowState) else jax.tree.map(clear, state)
            for state in cache.layers
        )
        lanes = jax.tree.map(partial(jnp.where, fresh), new, lanes)
        return _pin(Cache(layers, clear(cache.length))), _pin_lanes(lanes)

    def _prefill(
        self,
        params: Any,
        cache: Cache,
        tokens: Int[Array, "B C"],
        counts: Int[Array, " B"],
    ) -> Cache:
        """Feeds each lane the first `counts[b]` tokens of its row of a chunk; no logits."""
        real = jnp.arange(tokens.shape[1]) < counts[:, None]
        model = nnx.merge(self.graphdef, params)
        out = model.forward(
            tokens, segment_ids=real.astype(jnp.int32), cache=cache, logits_at="none"
        )
        return _pin(out.cache)

    def _decode(
        self,
        params: Any,
        cache: Cache,
        lanes: Lanes,
        key: Array,
        sampling: Sampling,
        stop_ids: Int[Array, " n"],
        *,
        steps: int,
    ) -> tuple[Cache, Lanes, Int[Array, "B steps"]]:
        """Decodes `steps` tokens a lane.

        Args:
          params: weights.
          cache: donated.
          lanes: donated.
          key: typed key of the whole generation.
          sampling: how to choose.
          stop_ids: a lane that chooses one of these becomes idle and does not emit it.
          steps: fixed number of steps, whatever the lanes do.

        Returns:
          The new cache and lanes, and the emitted tokens, `NO_TOKEN` where a lane was idle.
        """
        model = nnx.merge(self.graphdef, params)

        def step(carry, _):
            cache, lanes = carry
            active = lanes.remaining > 0
            out = model.forward(
                lanes.token[:, None],
                segment_ids=active.astype(jnp.int32)[:, None],
                cache=cache,
                logits_at="last",
            )
            # The cache has seen `length` tokens, so that is the chosen token's position.
            chosen = sample(out.logits, key, lanes.request, out.cache.length, sampling)
            chosen = constrain(chosen, "t")
            stops = active & jnp.any(chosen[:, None] == stop_ids, axis=1)
            remaining = jnp.where(stops, 0, jnp.maximum(lanes.remaining - 1, 0))
            emitted = jnp.where(active & ~stops, chosen, NO_TOKEN)
            token = jnp.where(active, chosen, lanes.token)
            return (_pin(out.cache), Lanes(token, remaining, lanes.request)), emitted

        (cache, lanes), tokens = jax.lax.scan(step, (cache, lanes), length=steps)
        # Whole on every device, so that every process can read the tokens.
        return cache, _pin_lanes(lanes), constrain(tokens.T, "tt")
