"""One run of generation: the device's cache and lanes, driven by a schedule.

Calls are only sent to the device here, which works through them in order; the host waits for
nothing but a block's tokens, and reads block i only when block i+1 is on its way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jaxtyping import Int32

from jet_jax.decode import DeviceFunctions, Lanes
from jet_jax.sampling import Sampling
from jet_jax.schedule import Piece, Schedule


@dataclasses.dataclass
class Timing:
    """Where a generation's time went, in seconds of wall time, and what was done in it.

    `new_tokens` are those returned. Decoding's time includes what the caller does between pieces.
    """

    compile_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prompt_tokens: int = 0
    new_tokens: int = 0


def mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """A context with the mesh that the weights are on, an empty one if they are on none."""
    sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return jax.set_mesh(sharding.mesh)
    return contextlib.nullcontext()


@dataclasses.dataclass
class Session:
    """What one run of generation needs; `run` may be called once.

    Attributes:
      functions: the model's compiled functions.
      params: its weights.
      schedule: the requests.
      max_length: tokens that the cache holds a lane.
      chunk: tokens that a lane prefills at once.
      block: tokens decoded a call.
      key: typed key.
      sampling: from `make_sampling`.
      stop_ids: padded ids that end a text.
      timing: filled in if given; prefill then waits for decoding, and the other way round.
    """

    functions: DeviceFunctions
    params: Any
    schedule: Schedule
    max_length: int
    chunk: int
    block: int
    key: jax.Array
    sampling: Sampling
    stop_ids: Int32[np.ndarray, " n"]
    timing: Timing | None = None

    def __post_init__(self) -> None:
        self._since = time.perf_counter()
        # The mesh is set for each call alone: a generator must not leave it set while it waits.
        with mesh_of(self.params):
            self.cache, self.lanes = self.functions.start(
                lanes=len(self.schedule.occupant), max_length=self.max_length
            )
        sharding = jax.tree.leaves(self.params)[0].sharding
        if isinstance(sharding, SingleDeviceSharding):
            # As the results of later calls will be: a change would compile everything twice.
            self.cache, self.lanes = jax.device_put((self.cache, self.lanes), sharding)

    def run(self) -> Iterator[Piece]:
        """Yields the pieces of all requests."""
        schedule, sent = self.schedule, deque()
        if self.timing is not None:
            self._compile()
        while True:
            admitted = schedule.admit()
            if admitted:
                self._lap("decode_s")
                self._prefill(admitted)
                self._lap("prefill_s")
            working = schedule.send(self.block)
            if working is not None:
                sent.append((working, self._decode()))
                if len(sent) == 1:
                    continue
            if not sent:
                return
            earlier, block = sent.popleft()
            pieces = schedule.read(earlier, np.asarray(block))
            if self.timing is not None:
                self.timing.new_tokens += sum(len(piece.tokens) for piece in pieces)
                if not sent:
                    self._lap("decode_s")
            yield from pieces

    def _prefill(self, admitted: dict[int, int]) -> None:
        """Gives lanes their new requests and feeds all of a prompt but its last token."""
        fresh, token, request = np.zeros((3, len(self.schedule.occupant)), np.int32)
        for lane, r in admitted.items():
            fresh[lane], token[lane], request[lane] = 1, self.schedule.prompts[r][-1], r
            if self.timing is not None:
                self.timing.prompt_tokens += len(self.schedule.prompts[r])
        self._admit(fresh, Lanes(token, fresh * np.int32(self.schedule.new_tokens), request))
        for tokens, counts in self.schedule.chunks(admitted, self.chunk):
            self._feed(tokens, counts)

    def _admit(self, fresh: np.ndarray, new: Lanes) -> None:
        with mesh_of(self.params):
            self.cache, self.lanes = self.functions.admit(self.cache, self.lanes, fresh == 1, new)

    def _feed(self, tokens: np.ndarray, counts: np.ndarray) -> None:
        with mesh_of(self.params):
            self.cache = self.functions.prefill(self.params, self.cache, tokens, counts)

    def _decode(self) -> jax.Array:
        with mesh_of(self.params):
            self.cache, self.lanes, block = self.functions.decode(
                self.params,
                self.cache,
                self.lanes,
                self.key,
                self.sampling,
                self.stop_ids,
                steps=self.block,
            )
        block.copy_to_host_async()
        return block

    def _compile(self) -> None:
        """Runs every function on idle lanes, which computes but changes nothing."""
        idle = np.zeros(len(self.schedule.occupant), np.int32)
        self._admit(idle, Lanes(idle, idle, idle))
        self._feed(np.zeros((len(idle), self.chunk), np.int32), idle)
        self._decode()
        self._lap("compile_s")

    def _lap(self, name: str) -> None:
        """Adds the time since the last lap to one of `timing`'s, once the device is done."""
        if self.timing is None:
            return
        jax.block_until_ready(self.cache)
        now = time.perf_counter()
        setattr(self.timing, name, getattr(self.timing, name) + now - self._since)
        self._since = now
