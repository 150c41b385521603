"""What a run reads, as one frozen dataclass."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """Says which text a run reads and how it becomes batches.

    Attributes:
      train: files, folders or globs of the training text (`sources.find_files`); one alone may be
        a string. Kept as a tuple.
      valid: the same for the validation text; empty for none.
      tokenizer: folder with a Hugging Face tokenizer.
      seq_len: T, tokens a row.
      batch_size: rows of one training batch, over all processes.
      seed: seed of the shuffling, 0 to 2**32 - 1.
      text_key: the key of a jsonl object that holds its text.
      doc_separator: what parts the documents of a txt file, matched literally ("\\n" also matches
        "\\r\\n"); "" makes each file one document. The default is two or more empty lines.
      shuffle: whether documents and packed rows are shuffled, anew in each epoch.
      add_bos: whether a document begins with the beginning-of-sequence token; None does what the
        tokenizer does by itself (Gemma's and Llama's put it there, Qwen's does not).
      add_eos: whether a document ends with the end-of-sequence token.
      pack_rows: rows that one process packs (and shuffles) together, None for 2**20 tokens' worth
        and at most 512. More rows mix documents better and take longer to fill first.
      num_threads: threads that read and tokenize; 0 does it in the calling thread.
      num_workers: processes that read, tokenize and pack. They start slowly (each imports the main
        module again), so 0 suits all but heavy pipelines.
      prefetch: batches made ahead in a thread (by each worker if there are workers); 0 makes
        them when asked for.
    """

    train: Sequence[str]
    valid: Sequence[str] = ()
    tokenizer: str = ""
    seq_len: int = 2048
    batch_size: int = 8
    seed: int = 0
    text_key: str = "text"
    doc_separator: str = "\n\n\n"
    shuffle: bool = True
    add_bos: bool | None = None
    add_eos: bool = True
    pack_rows: int | None = None
    num_threads: int = 8
    num_workers: int = 0
    prefetch: int = 2

    def __post_init__(self):
        for name in ("train", "valid"):
            paths = getattr(self, name)
            paths = (paths,) if isinstance(paths, str) else tuple(str(p) for p in paths)
            object.__setattr__(self, name, paths)
        if not self.train:
            raise ValueError("data.train is empty; give at least one file, folder or glob")
        if not self.tokenizer:
            raise ValueError("data.tokenizer is not set; give a folder with a tokenizer.json")
        at_least = {"seq_len": 1, "batch_size": 1, "pack_rows": 1}
        at_least |= {"num_threads": 0, "num_workers": 0, "prefetch": 0}
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is None and name == "pack_rows":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"data.{name}={value!r} must be an integer of at least {low}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed={self.seed!r} must be an integer from 0 to 2**32 - 1")
        if not self.text_key:
            raise ValueError('data.text_key is empty; name the jsonl key with the text ("text")')

    def local_batch(self, process_index: int, process_count: int) -> int:
        """Returns the rows of a batch that each of `process_count` processes makes.

        Raises:
          ValueError: the processes cannot share the batch evenly, or there is no such process.
        """
        if not 0 <= process_index < process_count:
            raise ValueError(f"{process_index=} is not below {process_count=}")
        if self.batch_size % process_count:
            raise ValueError(
                f"data.batch_size={self.batch_size} rows cannot be shared by {process_count} "
                f"processes; set it to a multiple of {process_count}"
            )
        return self.batch_size // process_count

    def stream_settings(self) -> dict:
        """Returns the JSON-safe settings that decide which batches a process sees."""
        same_batches = ("train", "valid", "tokenizer", "num_threads", "prefetch")
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in same_batches}
