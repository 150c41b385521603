"""Makes the recall text, its tokenizer and a teacher that needs exactly two of its layers.

    python data/recall/make.py --full 1 4          # trains data/recall/full_1_4, 5 to 10 minutes

A row is a table of pairs that lead from letters `a` to `b`, one of pairs from `b` to `c`, and
questions: after `a3` comes the `c` that its `b` leads to. All layers but two see four tokens. Two
look-ups one after the other are needed, and nothing short of attention over the whole row can make
one, so neither of the two layers can be spared: a search for two layers has a known answer.

Such rows are not learned from scratch in minutes, so the teacher starts on two pairs and is given
more as it learns, and its first full layer is told what to find: that layer's output, through the
model's own norm and head, is to predict the `b`. (Learning rates above 2e-3 find no look-up at
all.) `--text` writes text and tokenizer alone.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from jet_jax import checkpoint
from jet_jax.config import ModelConfig
from jet_jax.models.lm import HybridLM
from jet_jax.params import split

HERE = Path(__file__).parent
PAIRS, QUESTIONS, LETTERS = 12, 8, 16  # of a row of text; letters of each kind
END, SEPARATOR = "<end>", "?"
WORDS = [END, SEPARATOR, *(f"{kind}{i}" for kind in "abc" for i in range(LETTERS))]
LAYERS, WIDTH, WINDOW = 6, 64, 4
BATCH, RATE, ENOUGH = 64, 1e-3, 0.99
LESSONS = ((2, 600), (4, 800), (8, 1600), (PAIRS, 800))  # pairs, and steps at most


def rows(rng, count: int, pairs: int, questions: int) -> dict[str, np.ndarray]:
    """Rows of ids.

    Returns:
      `tokens` [count, T]; `where` [questions], the positions of the questions; the answers after
      one look-up, `middle`, and after both, `answer`, [count, questions].
    """

    def some(size):
        return rng.permuted(np.tile(np.arange(size), (count, 1)), axis=1)

    first = len(WORDS) - 3 * LETTERS
    a, b = (some(LETTERS)[:, :pairs] + first + LETTERS * i for i in (0, 1))
    c = rng.integers(LETTERS, size=(count, pairs)) + first + 2 * LETTERS
    order, asked = some(pairs), some(pairs)[:, :questions]

    def pick(x, at):
        return np.take_along_axis(x, at, axis=1)

    parts = [(a, b), (pick(b, order), pick(c, order)), (pick(a, asked), pick(c, asked))]
    flat = [np.stack(part, -1).reshape(count, -1) for part in parts]
    separator = np.full((count, 1), WORDS.index(SEPARATOR))
    tokens = np.concatenate([*flat[:2], separator, flat[2]], axis=1).astype(np.int32)
    where = 4 * pairs + 1 + 2 * np.arange(asked.shape[1])
    return {"tokens": tokens, "where": where, "middle": pick(b, asked), "answer": pick(c, asked)}


def write_text() -> None:
    """Writes tokenizer/, train.jsonl and search.jsonl, which share no row."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (HERE / "tokenizer").mkdir(exist_ok=True)
    backend.save(str(HERE / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (HERE / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    for seed, (name, count) in enumerate({"train": 2048, "search": 128}.items()):
        made = rows(np.random.default_rng(seed), count, PAIRS, QUESTIONS)["tokens"]
        lines = (json.dumps({"text": " ".join(WORDS[i] for i in row)}) for row in made)
        (HERE / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def teacher_config(full: tuple[int, ...]) -> ModelConfig:
    """The teacher with full attention in some layers and windows elsewhere."""
    attention = {"num_heads": 4, "num_kv_heads": 4, "head_dim": WIDTH // 4}
    return ModelConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=2 * WIDTH,
        layer_types=tuple("attn" if i in full else "swa" for i in range(LAYERS)),
        mixers={"attn": attention, "swa": attention | {"window_size": WINDOW}},
        initializer_range=0.05, max_position_embeddings=128, eos_token_id=0, dtype="float32",
    )  # fmt: skip


def train(full: tuple[int, ...]) -> tuple[HybridLM, float]:
    """Trains a teacher; returns it with its accuracy on rows of all pairs."""
    graphdef, params = nnx.split(HybridLM(teacher_config(full), rngs=nnx.Rngs(0)))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(optax.linear_schedule(0, RATE, 50), 0.9, 0.95, weight_decay=0.1),
    )
    moments = optimizer.init(params)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        out = model.forward(batch["tokens"], collect=("hidden_states",))
        half = out.features["hidden_states"][full[0] + 1][:, batch["where"]]
        total, hits = 0.0, []
        for logits, wanted in (
            (model.head(model.norm(half)), batch["middle"]),
            (out.logits[:, batch["where"]], batch["answer"]),
        ):
            nats = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
            total += nats.mean()
            hits.append((logits.argmax(-1) == wanted).mean())
        return total, jnp.stack(hits)

    @jax.jit
    def step(params, moments, batch):
        grads, hits = jax.grad(loss, has_aux=True)(params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, hits

    rng = np.random.default_rng(2)
    hits = np.zeros(2)
    for pairs, steps in LESSONS:
        recent = []
        for n in range(1, steps + 1):
            batch = rows(rng, BATCH, pairs, min(pairs, QUESTIONS))
            params, moments, now = step(params, moments, batch)
            recent = [*recent[-49:], now]
            if n % 50 == 0:
                hits = np.mean(recent, axis=0)
                print(
                    f"{pairs} pairs, step {n}: look-up {hits[0]:.3f}, answer {hits[1]:.3f}",
                    flush=True,
                )
                # Few pairs are answered by guessing, so only the look-up counts there.
                if hits[0] > ENOUGH and (pairs <= 4 or hits[1] > ENOUGH):
                    break
    return nnx.merge(graphdef, params), float(hits[1])


def main() -> None:
    """Writes the text, and trains and saves a teacher unless only text is wanted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", type=int, nargs=2, metavar="LAYER", help="the two full layers")
    parser.add_argument("--text", action="store_true", help="write text and tokenizer alone")
    args = parser.parse_args()
    if not args.text and not args.full:
        parser.error("give --full FIRST SECOND, or --text")
    if args.full and not 1 <= args.full[0] < args.full[1] < LAYERS:
        parser.error(f"--full needs two layers from 1 to {LAYERS - 1}, ascending")
    write_text()
    if args.text:
        return
    model, accuracy = train(tuple(args.full))
    if accuracy < ENOUGH:
        sys.exit(f"the teacher answers {accuracy:.3f} only; nothing is saved")
    target = HERE / "full_{}_{}".format(*args.full)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), split(model)[1])
    checkpoint.save_model(target, model.config, weights, HERE / "tokenizer", overwrite=True)
    print(f"{target}: answers {accuracy:.3f}")


if __name__ == "__main__":
    main()
