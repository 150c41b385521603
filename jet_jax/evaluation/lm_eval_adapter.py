"""A model for EleutherAI's lm-evaluation-harness (`pip install 'jet-jax[eval]'`), without torch.

    lm_eval.simple_evaluate(JetLM(model, tokenizer), tasks=["arc_easy"])

Importing this module needs the package `lm_eval`, and registers the model there as "jet-jax".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from jet_jax.data.tokenizer import TextTokenizer
from jet_jax.evaluation import harness
from jet_jax.evaluation.rows import Passage, pack
from jet_jax.generation import Generator
from jet_jax.io import load
from jet_jax.models.lm import HybridLM
from jet_jax.prompt_text import ending_ids, find_tokenizer, load_matching

SHORTEST = 256  # tokens of the shortest rows; the next ones are four times as long
PASSAGES = 512  # continuations packed and scored at a time


@register_model("jet-jax")
class JetLM(TemplateLM):
    """Scores and generates for lm-eval.

    Continuations are packed into rows of few lengths (256, 1024, …, `max_length`), so that few
    programs are compiled. Texts begin with bos where the tokenizer begins them so.

    Args:
      pretrained: a model, or a directory for `jet_jax.load`.
      tokenizer: of the model; by default the one in its directory.
      batch_size: rows scored and prompts continued at a time.
      max_length: tokens that the model sees at once; longer contexts lose their beginning.
      max_gen_toks: tokens generated where a task does not say.
      end_ids: ids that end a text; by default those of model and tokenizer.
      seed: of sampling.
      dtype: for `jet_jax.load`.

    Raises:
      ValueError: no tokenizer, one that does not fit, or lengths below 2.
    """

    def __init__(
        self,
        pretrained: HybridLM | str,
        tokenizer: TextTokenizer | None = None,
        *,
        batch_size: int | str = 8,
        max_length: int = 4096,
        max_gen_toks: int = 256,
        end_ids: Sequence[int] | None = None,
        seed: int = 0,
        dtype: str = "bfloat16",
        device: str | None = None,
    ):
        super().__init__()
        if device is not None:
            raise ValueError("device: JAX chooses it; set JAX_PLATFORMS instead")
        self.batch_size, self.max_length = int(batch_size), int(max_length)
        self.max_gen_toks, self.seed = int(max_gen_toks), int(seed)
        if self.max_length < 2 or self.max_gen_toks < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_length={max_length} must be at least 2, max_gen_toks={max_gen_toks} and "
                f"batch_size={batch_size} at least 1"
            )
        if isinstance(pretrained, str):
            where, pretrained = find_tokenizer(pretrained), load(pretrained, dtype=dtype)
            tokenizer = tokenizer or load_matching(where, pretrained.config)
            end_ids = end_ids or ending_ids(where, tokenizer, pretrained.config)
        if tokenizer is None:
            raise ValueError("a model that is not a directory needs a tokenizer")
        self.model, self.text_tokenizer = pretrained, tokenizer
        self.tokenizer = tokenizer.hf  # TemplateLM takes chat templates from it
        if end_ids is None:
            ids = {*pretrained.config.eos_ids, tokenizer.eos_id}
            end_ids = [i for i in ids if i is not None]
        self.end_ids = tuple(end_ids)
        self.generator = Generator(self.model, lanes=self.batch_size)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text, 0 where there is none."""
        eos = self.text_tokenizer.eos_id
        return eos if eos is not None else next(iter(self.end_ids), 0)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: bos, else the id that ends a text."""
        bos = self.text_tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation in the tokenizer's chat template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with bos before them as the tokenizer has it, or as told."""
        ids, bos = self.text_tokenizer.encode(string).tolist(), self.text_tokenizer.bos_id
        wanted = self.text_tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        return [bos, *ids] if wanted and bos is not None and ids[:1] != [bos] else ids

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, text) for _, context, text in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in nats, in windows that do not overlap."""
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            found = [make_disjoint_window(window) for window in windows]
            pairs += found
            owners += [owner] * len(found)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(pairs, disable_tqdm), strict=True):
            totals[owner] += logprob
        return totals

    def _score(self, pairs: list[Any], is_quiet: bool) -> list[tuple[float, bool]]:
        """Log-probability of each text after its context, and whether greedy decoding gives it."""
        out = [(0.0, True)] * len(pairs)
        passages: dict[int, list[tuple[int, Passage]]] = {}
        for i, (context, text) in enumerate(pairs):
            text = text[-self.max_length :]
            if not text:
                continue
            context = context[-(self.max_length + 1 - len(text)) :]
            length = min(SHORTEST, self.max_length)
            while length < len(context) + len(text) - 1:
                length = min(4 * length, self.max_length)
            passages.setdefault(length, []).append((i, Passage(context).ask(text)))
        with tqdm(total=len(pairs), disable=is_quiet, desc="Scoring continuations") as bar:
            for length, found in sorted(passages.items(), reverse=True):
                found.sort(key=lambda numbered: -len(numbered[1].ids))
                for start in range(0, len(found), PASSAGES):
                    some = found[start : start + PASSAGES]
                    rows = pack([passage for _, passage in some], length, name="lm_eval")
                    scored = harness.evaluate(self.model, rows, self.batch_size)["per_item"]
                    for j, (i, _) in enumerate(some):
                        out[i] = (float(scored["logprob"][j]), bool(scored["wrong"][j] == 0))
                    bar.update(len(some))
        return out

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to the first of its stop strings, which is left out."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        out = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Generating") as bar:
            for indices in groups.values():
                options = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
                options["max_gen_toks"] = min(options["max_gen_toks"], self.max_length - 1)
                room = self.max_length - options["max_gen_toks"]
                prompts = {
                    i: self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id]
                    for i in indices
                }
                indices.sort(key=lambda i: -len(prompts[i]))
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    texts = self._generate([prompts[i] for i in batch], options, batch[0])
                    for i, text in zip(batch, texts, strict=True):
                        out[i] = text
                    bar.update(len(batch))
        return out

    def _generate(self, prompts: list[list[int]], options: Any, number: int) -> list[str]:
        """Texts up to their stop strings; decoding ends when each has one."""
        stops = [stop for stop in options["until"] if stop]
        sampling: dict[str, Any] = {
            "temperature": options.get("temperature", 0.0) if options["do_sample"] else 0.0
        }
        if sampling["temperature"]:
            sampling |= {name: options[name] for name in ("top_k", "top_p") if options.get(name)}
        needed = len(prompts[0]) + options["max_gen_toks"]
        stream = self.generator.stream(
            prompts,
            options["max_gen_toks"],
            eos_id=self.end_ids,
            key=jax.random.fold_in(jax.random.key(self.seed), number),
            max_length=max(64, 1 << (needed - 1).bit_length()),  # few sizes, few programs
            **sampling,
        )
        ids: list[list[int]] = [[] for _ in prompts]
        texts, running = [""] * len(prompts), set(range(len(prompts)))
        for piece in stream:
            i = piece.request
            ids[i] += piece.tokens
            texts[i] = self.text_tokenizer.decode(ids[i])
            if piece.is_last or any(stop in texts[i] for stop in stops):
                running.discard(i)
            if not running:
                break
        for stop in stops:
            texts = [text.split(stop)[0] for text in texts]
        return texts
