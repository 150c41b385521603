"""Local text to packed batches: sources, tokenizer, packing, iterators whose state can be saved."""

from jet_jax.data.config import DataConfig
from jet_jax.data.iterator import TrainIterator, load_state
from jet_jax.data.loader import make_train_iterator, make_valid_batches
from jet_jax.data.sources import TextSource, find_files
from jet_jax.data.tokenizer import TextTokenizer, check_vocab, load_tokenizer

__all__ = [
    "DataConfig",
    "TextSource",
    "TextTokenizer",
    "TrainIterator",
    "check_vocab",
    "find_files",
    "load_state",
    "load_tokenizer",
    "make_train_iterator",
    "make_valid_batches",
]
