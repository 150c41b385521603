"""`jet-jax generate`: streams the continuation of prompts as text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jet_jax.commands.model_options import add_model_options, dtype_of

if TYPE_CHECKING:
    from jet_jax.detokenize import Detokenizer
    from jet_jax.generation import Piece, Timing

SEPARATOR = "\n---\n"  # between the texts of several prompts


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Adds the arguments of `jet-jax generate`."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts, streaming the text",
        description="Continues prompts with a model and streams the text. Several prompts run as "
        "one batch and are printed one after the other, with a line --- between them.",
    )
    add = parser.add_argument
    add("model", help="a Hugging Face, converted or training directory")
    add("--prompt", action="append", default=[], help="text; may be repeated")
    add(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help="a file whose whole text is one prompt (- for standard input); may be repeated",
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample within the likeliest probability mass P")
    add("--seed", type=int, default=0, metavar="N", help="of the sampling; default 0")
    add_model_options(parser)
    add("--chat", action="store_true", help="put each prompt into the model's chat template")
    add("--no-echo", action="store_true", help="print only the new text (as --chat does)")
    add("--stats", action="store_true", help="print tokens/s to standard error in the end")


def run(args: argparse.Namespace) -> int:
    """Runs the command.

    Returns:
      The exit status, 0.

    Raises:
      ValueError: for a directory without a model or tokenizer, prompts that do not fit, or
        parameters out of their range.
    """
    texts = args.prompt + [_read(path) for path in args.prompt_file]
    if not texts:
        raise ValueError('no prompt; give --prompt "some text" or --prompt-file FILE')
    if args.temperature == 0 and (args.top_k is not None or args.top_p is not None):
        raise ValueError("--top-k and --top-p choose among samples; set --temperature above 0")

    import jax

    from jet_jax.detokenize import Detokenizer
    from jet_jax.generation import Generator, Timing
    from jet_jax.io import load, load_config
    from jet_jax.prompt_text import encode, ending_ids, find_tokenizer, load_matching
    from jet_jax.sampling import make_sampling

    # What is wrong with the request comes up before the weights are read.
    config = load_config(args.model)
    make_sampling(config.vocab_size, args.temperature, args.top_k, args.top_p)
    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={args.max_new_tokens} must be at least 1")
    where = find_tokenizer(args.model, args.tokenizer)
    tokenizer = load_matching(where, config)
    prompts = [encode(tokenizer, text, args.chat) for text in texts]
    dtype = dtype_of(args)
    generator = Generator(load(args.model, dtype=dtype))
    timing = Timing() if args.stats else None
    pieces = generator.stream(
        prompts,
        args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_id=ending_ids(where, tokenizer, generator.config),
        key=jax.random.key(args.seed),
        timing=timing,
    )
    heads = [""] * len(texts) if args.chat or args.no_echo else texts
    printer = OrderedPrinter(heads, [Detokenizer(tokenizer.decode, ids) for ids in prompts])
    for piece in pieces:
        printer.add(piece)
    if timing is not None:
        print(report(timing), file=sys.stderr)
    return 0


def _read(path: str) -> str:
    """The text of a prompt file, without the line break that editors put at the end."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file {path} is not UTF-8 text: {error}") from error
    return text.removesuffix("\n")


class OrderedPrinter:
    """Prints texts that grow at the same time one after the other, each as soon as it may.

    Args:
      heads: what each text begins with; the first is printed at once.
      detokenizers: one a text.
    """

    def __init__(self, heads: list[str], detokenizers: list[Detokenizer]):
        self._detokenizers = detokenizers
        self._texts = heads  # not printed yet
        self._ended = [False] * len(heads)
        self._current = 0
        self._print()

    def add(self, piece: Piece) -> None:
        """Takes new tokens of one text."""
        detokenizer = self._detokenizers[piece.request]
        self._texts[piece.request] += detokenizer.push(piece.tokens)
        if piece.is_last:
            self._texts[piece.request] += detokenizer.flush()
            self._ended[piece.request] = True
        self._print()

    def _print(self) -> None:
        count = len(self._texts)
        while self._current < count:
            text, self._texts[self._current] = self._texts[self._current], ""
            sys.stdout.write(text)
            if not self._ended[self._current]:
                break
            self._current += 1
            sys.stdout.write(SEPARATOR if self._current < count else "\n")
        sys.stdout.flush()


def report(timing: Timing) -> str:
    """A line on the speed of prefill and decoding, and the time that compiling took."""

    def rate(tokens: int, seconds: float) -> str:
        return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):,.1f} tokens/s)"

    return (
        f"prefill {rate(timing.prompt_tokens, timing.prefill_s)}, "
        f"decode {rate(timing.new_tokens, timing.decode_s)}, compile {timing.compile_s:.1f} s"
    )
