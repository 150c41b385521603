"""Generation: equal to the uncached forward, whatever the batch, the lanes and the mesh."""

import gc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import tiny_config

import jet_jax
from jet_jax import generation, session, sharding
from jet_jax.decode import DeviceFunctions
from jet_jax.generation import Generator, Timing
from jet_jax.models.lm import HybridLM
from jet_jax.params import abstract, split
from jet_jax.prompts import cache_length, stop_ids
from jet_jax.sampling import make_sampling
from jet_jax.schedule import Schedule

GOLDEN = Path(__file__).parent / "golden"
ROWS, ROW = 7, 64  # padded size of the uncached forward passes, so that each model compiles one
forward = jax.jit(lambda graphdef, params, *a: nnx.merge(graphdef, params)(*a), static_argnums=0)


def prompts_of(lengths, vocab=257, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).tolist() for n in lengths]


def logits_after(model, prompts, outputs):
    """Uncached logits from which each output token was to be chosen, one array a prompt."""
    graphdef, params = split(model)
    rows = [p + o for p, o in zip(prompts, outputs, strict=True)]
    tokens, real = np.zeros((2, ROWS, ROW), np.int32)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)] = ids
        real[i, : len(ids)] = 1
    logits = np.asarray(forward(graphdef, params, tokens, real))[: len(rows)]
    return [
        x[len(p) - 1 : len(p) - 1 + len(o)]
        for x, p, o in zip(logits, prompts, outputs, strict=True)
    ]


def assert_greedy(model, prompts, outputs):
    for logits, tokens in zip(logits_after(model, prompts, outputs), outputs, strict=True):
        np.testing.assert_array_equal(logits.argmax(-1), tokens)


def compiles(functions):
    return [getattr(functions, f)._cache_size() for f in ("start", "admit", "prefill", "decode")]


def make_model(seed=0, **changes):
    # Larger weights than at the start of training, so that the likeliest token varies.
    return HybridLM(tiny_config(initializer_range=0.3, **changes), rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def generator(model):
    return Generator(model, lanes=2, prefill_chunk=8, block=4)


@pytest.mark.parametrize("name", ["jet_nemotron_small", "gemma3_small"])
def test_golden_models(name):
    """Recorded greedy tokens; then ragged prompts through the same compiled functions."""
    model = jet_jax.load(GOLDEN / name, dtype="float32")
    expected = np.load(GOLDEN / name / "expected.npz")
    ids, greedy = expected["input_ids"], expected["greedy_tokens"]
    if "greedy_prompt_len" in expected:
        ids = ids[:, : int(expected["greedy_prompt_len"])]
    generator = Generator(model, lanes=2, prefill_chunk=16)
    out = generator.generate(ids.tolist(), greedy.shape[1], eos_id=(), max_length=ROW)
    np.testing.assert_array_equal(out, greedy)
    window = next(o.window_size for kind, o in model.config.mixers if kind == "swa")
    lengths = [1, 2, 3, 17, window + 20]  # one chunk and several; longer than the window
    prompts = prompts_of(lengths, model.config.vocab_size)
    out = generator.generate(prompts, 16, eos_id=(), max_length=ROW)
    assert [len(o) for o in out] == [16] * 5
    assert_greedy(model, prompts, out)
    assert compiles(generator.functions) == [1, 1, 1, 1]


def test_prompt_lengths_compile_nothing(model, generator):
    prompts = prompts_of([1, 8, 9, 10, 33, 2, 40])
    out = generator.generate(prompts, 13)
    before = compiles(generator.functions)
    assert_greedy(model, prompts, out)
    for lengths in ([5], [17, 3, 30], [50] * 4):
        generator.generate(prompts_of(lengths, seed=1), 7)
    assert compiles(generator.functions) == before == [1, 1, 1, 1]


def test_stream_is_what_generate_returns(generator):
    prompts = prompts_of([3, 20, 7, 11, 2])
    pieces = list(generator.stream(prompts, 10))
    out = [[] for _ in prompts]
    for request, tokens, _ in pieces:
        out[request] += tokens
    assert out == generator.generate(prompts, 10)
    assert all(len(tokens) <= 4 for _, tokens, _ in pieces)
    assert sorted(request for request, _, is_last in pieces if is_last) == [0, 1, 2, 3, 4]
    ended = set()
    for request, _, is_last in pieces:
        assert request not in ended
        if is_last:
            ended.add(request)


def test_the_next_block_is_sent_before_one_is_read(generator, monkeypatch):
    events = []
    decode, read = session.Session._decode, Schedule.read
    monkeypatch.setattr(
        session.Session, "_decode", lambda self: events.append("send") or decode(self)
    )
    monkeypatch.setattr(
        Schedule, "read", lambda self, *args: events.append("read") or read(self, *args)
    )
    generator.generate(prompts_of([4]), 16)
    assert events == ["send", "send", "read", "send", "read", "send", "read", "read"]


def test_stop_tokens(generator):
    """Every request ends before its first stop token, and the lanes go on with the others."""
    prompts = prompts_of([4, 9, 21, 6, 13])
    full = generator.generate(prompts, 24)
    before = compiles(generator.functions)
    stops = {full[0][0], full[1][5], full[2][11]}

    def cut(tokens, ids):
        return tokens[: next((i for i, t in enumerate(tokens) if t in ids), len(tokens))]

    expected = [cut(tokens, stops) for tokens in full]
    assert expected[0] == [] and len({len(e) for e in expected}) > 2
    assert generator.generate(prompts, 24, eos_id=sorted(stops)) == expected
    one = full[2][11]
    assert generator.generate(prompts, 24, eos_id=one) == [cut(t, {one}) for t in full]
    assert compiles(generator.functions) == before


def test_default_stop_tokens_are_the_models():
    config = tiny_config(eos_token_id=(3, 9))
    assert stop_ids(None, config).tolist() == [3, 9] + [-1] * 6
    assert stop_ids((), config).tolist() == [-1] * 8
    assert stop_ids(None, tiny_config()).tolist() == [-1] * 8
    assert stop_ids(range(9), config).shape == (16,)


def test_samples_do_not_depend_on_the_batch(model, generator):
    prompts = prompts_of([3, 20, 7, 11, 2])
    options = {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "key": jax.random.key(7)}
    two = generator.generate(prompts, 12, **options)
    one = Generator(model, lanes=1, prefill_chunk=16, block=5).generate(prompts, 12, **options)
    assert two == one
    ranks = [
        (logits > np.take_along_axis(logits, np.asarray(tokens)[:, None], 1)).sum(1)
        for logits, tokens in zip(logits_after(model, prompts, two), two, strict=True)
    ]
    assert 0 < np.max(ranks) < 40
    assert generator.generate(prompts[:1], 12, **options) == two[:1]
    raw = options | {"key": jax.random.key_data(options["key"])}
    assert generator.generate(prompts, 12, **raw) == two
    before = compiles(generator.functions)
    other = options | {"key": jax.random.key(8), "temperature": 1.3, "top_k": 35, "top_p": 0.8}
    assert generator.generate(prompts, 12, **other) != two
    assert compiles(generator.functions) == before
    same_text = generator.generate([prompts[0]] * 2, 12, **options)
    assert same_text[0] != same_text[1]  # the index takes part


def test_other_weights_compile_nothing(generator):
    prompts = prompts_of([5, 12])
    other = make_model(seed=1)
    before, first = compiles(generator.functions), generator.generate(prompts, 8)
    changed = generator.with_params(split(other)[1])
    out = changed.generate(prompts, 8)
    assert_greedy(other, prompts, out)
    assert out != first and generator.generate(prompts, 8) == first
    assert compiles(generator.functions) == before


def test_generate_follows_the_model_and_lets_it_go():
    """Weights may be updated between calls; compiled functions live as long as the model.

    Float32 weights computed in bfloat16, as in training: each token is the likeliest but for
    rounding.
    """
    changes = {"dtype": "bfloat16", "layer_types": ("jet",)}
    model, prompts = make_model(**changes), prompts_of([5, 12])
    first = jet_jax.generate(model, prompts, 8)
    functions = generation._functions[model]
    nnx.update(model, nnx.state(make_model(seed=1, **changes)))
    second = jet_jax.generate(model, prompts, 8)
    for logits, tokens in zip(logits_after(model, prompts, second), second, strict=True):
        chosen = np.take_along_axis(logits, np.asarray(tokens)[:, None], 1)[:, 0]
        assert np.all(chosen >= logits.max(1) - 0.02 * np.abs(logits).max())
    assert second != first and generation._functions[model] is functions
    assert compiles(functions) == [1, 1, 1, 1]
    kept = len(generation._functions)
    del model, functions
    gc.collect()
    assert len(generation._functions) == kept - 1


def test_timing(generator):
    timing = Timing()
    prompts = prompts_of([5, 12, 3])
    out = generator.generate(prompts, 9, timing=timing)
    assert out == generator.generate(prompts, 9)
    assert (timing.prompt_tokens, timing.new_tokens) == (20, 27)
    assert min(timing.compile_s, timing.prefill_s, timing.decode_s) > 0


def test_sharded_equals_unsharded(model, generator):
    prompts = prompts_of([1, 8, 19, 12])
    expected = generator.generate(prompts, 12)
    graphdef, params = split(model)
    mesh = sharding.make_mesh(2, 2, 2)
    params = jax.device_put(params, sharding.shardings(params, mesh))
    sharded = Generator(graphdef=graphdef, params=params, lanes=4, prefill_chunk=8, block=4)
    assert sharded.generate(prompts, 12) == expected
    assert sharded.generate(prompts[::-1], 12) == expected[::-1]
    assert compiles(sharded.functions) == [1, 1, 1, 1]
    with jax.set_mesh(mesh):
        cache, _ = sharded.functions.start(lanes=4, max_length=64)
    assert cache.layers[1].k.sharding.shard_shape((4, 64, 2, 8)) == (1, 64, 1, 8)


def test_the_cache_is_donated_and_not_copied():
    """XLA's attention on a CPU transposes the keys and values of one layer at a time."""
    kinds = ("jet", "swa", *["attn"] * 12)
    attention = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    mixers = {
        "attn": attention,
        "swa": attention | {"window_size": 7},
        "jet": {"num_heads": 3, "head_dim": 8},
    }
    config = tiny_config(layer_types=kinds, mixers=mixers, vocab_size=31, intermediate_size=32)
    graphdef, params = abstract(config)
    functions = DeviceFunctions(graphdef, config)
    size = config.cache_bytes(2048, 2)
    cache, lanes = jax.eval_shape(lambda: functions._start(2, 2048))
    lower = functions.decode.lower
    sampling, key = make_sampling(31), jax.eval_shape(lambda: jax.random.key(0))
    memory = (
        lower(params, cache, lanes, key, sampling, jnp.zeros(8, jnp.int32), steps=16)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.1 * size
    chunk, counts = jnp.zeros((2, 8), jnp.int32), jnp.zeros(2, jnp.int32)
    memory = functions.prefill.lower(params, cache, chunk, counts).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 0.25 * size
    new = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), lanes)
    memory = functions.admit.lower(cache, lanes, counts == 1, new).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= size and memory.temp_size_in_bytes < 0.01 * size


def test_schedule_refills_lanes_before_reading():
    """A lane whose budget is all sent takes the next request without waiting for the tokens."""
    schedule = Schedule([np.zeros(2, np.int32)] * 3, lanes=1, new_tokens=6)
    assert schedule.admit() == {0: 0}
    assert schedule.send(4) == {0: 0} and schedule.admit() == {}
    assert schedule.send(4) == {0: 0}
    assert schedule.admit() == {0: 1}
    assert schedule.send(4) == {0: 1}
    first = schedule.read({0: 0}, np.asarray([[5, 6, 7, 8]], np.int32))
    assert first == [(0, [5, 6, 7, 8], False)]
    assert schedule.read({0: 0}, np.asarray([[9, 3, -1, -1]], np.int32)) == [(0, [9, 3], True)]
    # Request 1 stops at once; the block sent meanwhile brings nothing.
    assert schedule.send(4) == {0: 1} and schedule.admit() == {0: 2}
    assert schedule.read({0: 1}, np.full((1, 4), -1, np.int32)) == [(1, [], True)]
    assert schedule.read({0: 1}, np.full((1, 4), -1, np.int32)) == []
    assert schedule.occupant == [2]


def test_schedule_prefills_for_several_lanes_at_once():
    schedule = Schedule([np.zeros(2, np.int32)] * 19, lanes=16, new_tokens=9)
    assert schedule.admit() == {lane: lane for lane in range(16)}
    working = schedule.send(4)
    block = np.ones((16, 4), np.int32)
    block[5, 1:] = -1
    schedule.read(working, block)
    assert schedule.occupant[5] is None and schedule.admit() == {}  # one lane of 16 waits
    working = schedule.send(4)
    block[11, 0] = -1
    schedule.read(working, block)
    assert schedule.admit() == {5: 16, 11: 17}
    working = schedule.send(4)  # the others' budget ends here
    assert schedule.admit() == {0: 18} and not schedule.waiting


def test_cache_length_is_rounded_up_by_a_quarter_at_most():
    lengths = {cache_length([n], 16) for n in range(1, 5000)}
    assert len(lengths) < 30
    for n in (1, 48, 49, 300, 1000, 70_000):
        got = cache_length([n, 1], 16)
        assert n + 16 <= got <= max(64, 1.25 * (n + 16) + 64)
    assert cache_length([100, 3], 28, 128) == 128


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 257]], {}, "prompt 0 has token id 257 at position 1, outside .* vocabulary of 257"),
        ([[1], [-1]], {}, "prompt 1 has token id -1 at position 0"),
        (["hello"], {}, "prompt 0 is text; encode it"),
        ([1, 2, 3], {}, "prompt 0 is not a list of token ids"),
        ([[0.5]], {}, "prompt 0 is not a list of token ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        (
            [[1], [1] * 60],
            {"max_new_tokens": 8, "max_length": 64},
            "prompt 1 has 60 tokens and needs, with max_new_tokens=8, a cache of 68 tokens, but "
            "max_length=64; raise max_length",
        ),
        ([[1]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[1]], {"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ([[1]], {"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_input(generator, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generator.stream(prompts, **options)  # raised by the call, before anything is asked of it


def test_bad_generators(model):
    for options in ({"lanes": 0}, {"prefill_chunk": 0}, {"block": 0}):
        with pytest.raises(ValueError, match="=0 must be at least 1"):
            Generator(model, **options)
    with pytest.raises(ValueError, match="either a model or both graphdef and params"):
        Generator()
    with pytest.raises(ValueError, match="either a model or both graphdef and params"):
        Generator(graphdef=split(model)[0])


def test_no_prompts(generator):
    assert generator.generate([], 4) == []
