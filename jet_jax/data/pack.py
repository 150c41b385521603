"""Documents to rows: ids, then windows of tokens and targets, then rows of several windows.

Targets are the tokens one place later, taken within a document and before packing, so no target
crosses the border of a document. Windows of a long document overlap by that one token: each
transition of the corpus is trained exactly once an epoch.
"""

import dataclasses
from collections.abc import Sequence

import grain
import numpy as np
import tokenizers
from grain import experimental
from jaxtyping import Int32

from jet_jax.data.tokenizer import TextTokenizer
from kernels_pallas.segments import validate_segment_ids

Window = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Tokenize(grain.transforms.Map):
    """Maps a document's text to its ids, with the special tokens around it.

    It holds the Rust tokenizer alone: worker processes then need not import transformers.
    """

    backend: tokenizers.Tokenizer
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def make(cls, tokenizer: TextTokenizer, add_bos: bool | None, add_eos: bool) -> "Tokenize":
        """Makes the map; `add_bos=None` does what the tokenizer does by itself.

        Raises:
          ValueError: the tokenizer has no token for what is to be added.
        """
        add_bos = tokenizer.adds_bos if add_bos is None else add_bos
        around = []
        for option, wanted, token in (
            ("bos", add_bos, tokenizer.bos_id),
            ("eos", add_eos, tokenizer.eos_id),
        ):
            if wanted and token is None:
                raise ValueError(
                    f"data.add_{option}=True, but the tokenizer has no {option} token; name one in "
                    f"its tokenizer_config.json ({option}_token) or set data.add_{option}=False"
                )
            around.append((token,) if wanted else ())
        return cls(tokenizer.hf.backend_tokenizer, *around)

    def map(self, element: str) -> Int32[np.ndarray, "T"]:
        """Returns the ids of one document."""
        # A batch of one: `encode` holds Python's lock, so that threads would wait for each other.
        ids = self.backend.encode_batch_fast([element], add_special_tokens=False)[0].ids
        return np.asarray([*self.before, *ids, *self.after], np.int32)


@dataclasses.dataclass(frozen=True)
class Windows(experimental.FlatMapTransform):
    """Cuts a document's ids into windows of at most `seq_len` tokens and as many targets."""

    seq_len: int

    def flat_map(self, element: Int32[np.ndarray, "T"]) -> Sequence[Window]:
        """Returns the windows of one document; none for fewer than two ids."""
        starts = range(0, len(element) - 1, self.seq_len)
        # The last target of a window is the first token of the next.
        ends = [min(start + self.seq_len, len(element) - 1) for start in starts]
        return [
            {"tokens": element[a:b], "targets": element[a + 1 : b + 1]}
            for a, b in zip(starts, ends, strict=True)
        ]


def pack(
    windows: grain.IterDataset, *, seq_len: int, num_rows: int, shuffle: bool, seed: int
) -> grain.IterDataset:
    """Packs windows first-fit into rows of `seq_len`, `num_rows` of them at a time.

    A window goes whole into the first row with room; when one fits nowhere, the rows are given
    out (in random order if `shuffle`) and packing starts anew with it.
    """
    return experimental.FirstFitPackIterDataset(
        windows,
        length_struct={"tokens": seq_len, "targets": seq_len},
        num_packing_bins=num_rows,
        shuffle_bins=shuffle,
        seed=seed,
    )


def to_batch(rows: dict[str, np.ndarray]) -> Batch:
    """Names the arrays of packed rows as the training step takes them.

    Returns:
      tokens, targets, segment_ids (from 1 in each row; 0 is padding) and positions (from 0 in each
      segment), int32 [B, T]; loss_mask, float32 [B, T], 1 where there is a target.
    """
    segment_ids = rows["tokens_segment_ids"].astype(np.int32)
    validate_segment_ids(segment_ids)  # 0.3 ms for 65,536 tokens; compiled code cannot check them
    return {
        "tokens": rows["tokens"],
        "targets": rows["targets"],
        "segment_ids": segment_ids,
        "positions": rows["tokens_positions"].astype(np.int32),
        "loss_mask": (segment_ids > 0).astype(np.float32),
    }
