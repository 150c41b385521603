"""Which request runs in which lane: the host's side of continuous batching.

A lane takes the next waiting request as soon as its own can need no further block: at once when
the blocks already sent to the device use up its budget, else when a fetched block shows that it
chose a stop token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from jet_jax.decode import NO_TOKEN


class Piece(NamedTuple):
    """New tokens of one request, in order.

    Attributes:
      request: index of its prompt.
      tokens: may be empty, in the last piece only.
      is_last: whether the request is finished; each request has one such piece.
    """

    request: int
    tokens: list[int]
    is_last: bool


class Schedule:
    """The lanes' occupants and what each request may still emit.

    Args:
      prompts: token ids, none empty.
      lanes: number of lanes B.
      new_tokens: the most tokens that a request may emit.
    """

    def __init__(self, prompts: Sequence[Int[np.ndarray, " _"]], lanes: int, new_tokens: int):
        self.prompts = prompts
        self.new_tokens = new_tokens
        self.waiting = deque(range(len(prompts)))
        self.occupant: list[int | None] = [None] * lanes
        self.unsent = [0] * lanes  # tokens that blocks not yet sent may still emit
        self.unread = {request: new_tokens for request in self.waiting}  # unfinished requests

    def admit(self) -> dict[int, int]:
        """Gives free lanes the next requests; returns {lane: request} of the new ones.

        A prefill costs as much for one lane as for all, so while others work it waits until an
        eighth of the lanes is free.
        """
        free = [lane for lane, occupant in enumerate(self.occupant) if occupant is None]
        enough = min(len(self.waiting), max(1, len(self.occupant) // 8))
        if len(free) < enough:
            return {}
        admitted = dict(zip(free, self.waiting, strict=False))
        for lane, request in admitted.items():
            self.waiting.popleft()
            self.occupant[lane] = request
            self.unsent[lane] = self.new_tokens
        return admitted

    def chunks(
        self, admitted: dict[int, int], size: int
    ) -> Iterator[tuple[Int32[np.ndarray, "B size"], Int32[np.ndarray, " B"]]]:
        """The chunks that prefill new requests: tokens and how many of each row are real.

        A prompt's last token is left out: it is what decoding starts from.
        """
        longest = max(len(self.prompts[request]) for request in admitted.values()) - 1
        for start in range(0, longest, size):
            tokens = np.zeros((len(self.occupant), size), np.int32)
            counts = np.zeros(len(self.occupant), np.int32)
            for lane, request in admitted.items():
                part = self.prompts[request][:-1][start : start + size]
                tokens[lane, : len(part)] = part
                counts[lane] = len(part)
            yield tokens, counts

    def send(self, steps: int) -> dict[int, int] | None:
        """Notes that a block of `steps` tokens goes to the device.

        Returns:
          {lane: request} of the lanes it works for, None (and no block needed) if there are none.
        """
        working = {lane: r for lane, r in enumerate(self.occupant) if r is not None}
        for lane in working:
            self.unsent[lane] -= steps
            if self.unsent[lane] <= 0:
                self.occupant[lane] = None
        return working or None

    def read(self, working: dict[int, int], block: Int32[np.ndarray, "B steps"]) -> list[Piece]:
        """The pieces in a fetched block; frees the lanes of requests that stopped in it."""
        pieces = []
        for lane, request in working.items():
            if request not in self.unread:  # it stopped in an earlier block
                continue
            tokens = [int(t) for t in block[lane] if t != NO_TOKEN]
            left = self.unread[request] - len(tokens)
            stopped = len(tokens) < min(block.shape[1], self.unread[request])
            if left and not stopped:
                self.unread[request] = left
            else:
                del self.unread[request]
                if self.occupant[lane] == request:
                    self.occupant[lane] = None
            pieces.append(Piece(request, tokens, request not in self.unread))
        return pieces
