"""What the pilot works with: the teacher, its supernets, text, and first weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks.pilot.ledger import Clock
from configs import search_smollm
from jet_jax import data, io, sharding
from jet_jax.evaluation.documents import perplexity_rows
from jet_jax.evaluation.rows import Rows
from jet_jax.evaluation.tasks import read_documents
from jet_jax.postnas.initialise import linear_weights
from jet_jax.postnas.search import Search
from jet_jax.postnas.search_config import LinearConfig, SearchConfig
from jet_jax.postnas.supernet import Supernet

KINDS = ("gla", "gdn")
REFIT_SEED = 1000  # of the texts that output projections are fitted on: a stream of its own
REFIT_TOKENS = 65_536


@dataclass(frozen=True)
class Sizes:
    """How much is trained and scored; half the batch of a long run, so that steps stay many.

    Attributes:
      align: rows and length of an alignment step, 8,192 tokens.
      path: rows and length of a step on a sampled path, 8,192 tokens.
      steps: of each, 2 million tokens.
      text_rows: held-out rows of the path's length.
      lengths: of the gates' questions.
      texts: of each of the gates' settings.
      questions: of each retrieval task that arms are scored on.
    """

    align: tuple[int, int] = (16, 512)
    path: tuple[int, int] = (4, 2048)
    steps: int = 244
    text_rows: int = 72
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    texts: int = 128
    questions: int = 256

    @classmethod
    def scaled(cls, scale: float) -> Sizes:
        """All of it times `scale`, but no less than what shows that everything works."""

        def size(x: int, least: int) -> int:
            return x if scale == 1 else max(least, round(x * scale))

        def shape(rows: int, length: int) -> tuple[int, int]:
            return size(rows, 2), size(length, 64)

        full = cls()
        return cls(
            align=shape(*full.align),
            path=shape(*full.path),
            steps=size(full.steps, 3),
            text_rows=size(full.text_rows, 2),
            lengths=tuple(sorted({size(x, 96) for x in full.lengths})),
            texts=size(full.texts, 2),
            questions=size(full.questions, 8),
        )


class Material:
    """The teacher and what arms are made of.

    Args:
      teacher: directory of the model.
      train: files of training text.
      valid: files of held-out documents.
      sizes: how much of everything.
      mesh: of one device.
      clock: is asked now and then whether there is time left.
      dtype: of the computation; None takes the teacher's own.
      threads: that tokenize.
    """

    def __init__(
        self, teacher: str, train: tuple[str, ...], valid: tuple[str, ...], sizes: Sizes,
        mesh: Mesh, clock: Clock, dtype: str | None, threads: int,
    ):  # fmt: skip
        config = search_smollm.get_config()
        config.teacher, config.dtype, config.compile_cache = teacher, dtype, ""
        config.data.train, config.data.num_threads = train, threads
        config.placement.windows, config.placement.window = 0, None
        config.placement.objectives.text.documents = valid
        self.config = SearchConfig.from_dict(config.to_dict())
        self.search = Search(self.config, Path("."), mesh)
        self.sizes, self.mesh, self.clock, self.valid = sizes, mesh, clock, valid
        self.teacher = self.search.teacher_weights
        self._kept: dict[Any, Any] = {}  # starts and batches that the next arm may want too

    @cached_property
    def nets(self) -> dict[str, Supernet]:
        """The supernet of each kind."""
        return {
            kind: dataclasses.replace(
                self.search,
                config=dataclasses.replace(self.config, linear=LinearConfig(kind)),
            ).net
            for kind in KINDS
        }

    @cached_property
    def tokenizer(self) -> data.TextTokenizer:
        """The teacher's."""
        return data.load_tokenizer(self.config.data.tokenizer, self.search.teacher.vocab_size)

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """The held-out documents."""
        return read_documents(self.valid)

    @cached_property
    def model(self) -> Any:
        """The untouched teacher as a model of its own."""
        model = io.load(self.config.teacher, self.search.teacher.dtype, self.mesh)
        model.scan_layers = True
        return model

    def text(self, rows: int) -> Rows:
        """The first held-out documents, about so many rows of the path's length of them."""
        length = self.sizes.path[1]
        budget, some = rows * length, []
        for document in self.documents:
            ids = self.tokenizer.encode(document)[: max(budget, 2)]
            some.append(self.tokenizer.decode(ids, skip_special=False))
            budget -= len(ids)
            if budget < length:
                break
        return perplexity_rows(self.tokenizer, some, length)

    def batches(self, rows: int, length: int, count: int, seed: int) -> list[Any]:
        """The first batches of the stream of a seed."""
        settings = dataclasses.replace(
            self.config.data, batch_size=rows, seq_len=length, seed=seed, prefetch=0, pack_rows=256
        )
        with closing(data.make_train_iterator(settings)) as iterator:
            return list(islice(iterator, count))

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes, or what it made for that key lately."""
        if key not in self._kept:
            while len(self._kept) > 8:
                del self._kept[next(iter(self._kept))]
            self._kept[key] = make()
        return self._kept[key]

    def start(self, kind: str, init: str, seed: int) -> Any:
        """A kind's linear paths before any training."""

        def make() -> Any:
            rows, length = self.sizes.align
            count = max(1, min(self.sizes.steps, REFIT_TOKENS // (rows * length)))
            key = jax.random.key(seed)
            batches = []
            if init == "copy_refit":
                batches = self.batches(rows, length, count, REFIT_SEED + seed)
            put = (sharding.put_batch(b, self.mesh) for b in batches)
            return linear_weights(self.nets[kind], self.teacher, init, key, put)

        return self.remember((kind, init, seed), make)
