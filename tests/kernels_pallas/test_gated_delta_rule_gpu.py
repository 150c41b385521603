"""The gated delta rule's kernels on a GPU, against float64 recurrences run there.

Compilers for Hopper have been seen to get gradients of just this pattern wrong without a word, at
lengths that no interpreter reaches; so every gradient is checked at thousands of tokens. Each head
of the long cases is one corner of the input space. `pytest -s` prints the errors.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_recurrence import compile_recurrence, errors_per_head
from kernel_oracles import LIMITS, NAMES

from kernels_pallas.gated_delta_rule import blocks
from kernels_pallas.gated_delta_rule.pallas import gated_delta_rule_pallas

pytestmark = pytest.mark.gpu

# Name of each corner: (log decays from .. to, writing strength, mean cosine of two keys).
CORNERS = {
    "SiLU keys": ((1e-3, 0.5), None, None),
    "g=0 beta=1 cos .9": ((0.0, 0.0), 1.0, 0.9),
    "g=-20": ((20.0, 20.0), None, None),
    "g=-1e-5..-100": ((1e-5, 100.0), None, None),
    "beta .95 cos .9": ((1e-3, 0.1), 0.95, 0.9),
    "beta=1 cos .9": ((1e-4, 1e-2), 1.0, 0.9),
}
MODEL = 6  # heads with decays as a model has them


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled shape."""

    dtype: str
    sizes: tuple[int, ...]  # B T H HV K V
    packed: bool = False
    is_split: bool = True  # T may be cut into segments


LONG = {
    f"{dtype}, T={sizes[1]}{', packed' * packed}": Case(dtype, sizes, packed, packed)
    for dtype in LIMITS
    for sizes, packed in (((1, 4096, 12, 12, 96, 256), False), ((2, 8209, 12, 12, 96, 256), True))
}
WIDTHS = {
    f"{dtype}, K={k} V={v}": Case(dtype, (2, 200, 2, 4, k, v))
    for dtype in LIMITS
    for k, v in ((64, 64), (96, 144), (128, 256), (192, 288), (256, 576))
}
DRAWS = {f"{d}, draws": Case(d, (125, 130, 8, 8, 96, 128)) for d in LIMITS}
CASES = LONG | WIDTHS | DRAWS


def segments(case):
    """Documents of 1 to thousands of tokens, with padding before, between and after them."""
    if not case.packed:
        return None
    lengths = [9, 3000, 1, 7, 200, 64, 100, 4096, 63, 669]
    ids = np.repeat([0, 1, 2, 0, 3, 4, 5, 6, 7, 0], lengths)
    return np.stack([ids, np.ones_like(ids)]).astype(np.int32)


def similar_keys(noise, cosine):
    common = jnp.abs(jax.random.normal(jax.random.key(1), noise.shape[-1:]))
    return common * np.sqrt(cosine) + noise * np.sqrt(1 - cosine)


@functools.partial(jax.jit, static_argnames="case")
def make(case):
    """Returns inputs and cotangents; of the model's heads also a, A_log and dt_bias."""
    b, t, h, hv, k, v = case.sizes
    keys = iter(jax.random.split(jax.random.key(0), 16))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    wide = jax.nn.silu(normal(b, t, h, k)), normal(b, t, h, k), normal(b, t, hv, v)
    beta, do = jax.nn.sigmoid(normal(b, t, hv)), normal(b, t, hv, v)
    state, dstate = 0.1 * normal(b, hv, k, v), 0.1 * normal(b, hv, k, v)
    q, noise, value = wide
    key, random = jax.nn.silu(noise), jax.random.uniform(next(keys), (b, t, hv))
    a_log = jnp.log(jnp.linspace(0.1, 16, hv))
    dt = jnp.geomspace(0.1, 1e-3, hv)
    dt_bias, a = dt + jnp.log(-jnp.expm1(-dt)), normal(b, t, hv)
    g = decays(a, a_log, dt_bias)
    for i, ((low, high), strength, cosine) in enumerate(CORNERS.values()):
        if i >= h:
            continue
        # Up to 100 at even odds in the logarithm, and exactly 0 or -20 where both ends are.
        drawn = jnp.exp(jnp.log(low) + random[..., i] * jnp.log(high / low)) if low else 0.0
        g = g.at[..., i].set(-drawn)
        beta = beta if strength is None else beta.at[..., i].set(strength)
        key = key if cosine is None else key.at[:, :, i].set(similar_keys(noise[:, :, i], cosine))
    dtype = jnp.dtype(case.dtype)
    q, key, value, do = (x.astype(dtype) for x in (q, key, value, do))
    return (q, key, value, g, beta, state), (do, dstate), (a, a_log, dt_bias)


def decays(a, a_log, dt_bias):
    return -jnp.exp(a_log) * jax.nn.softplus(a + dt_bias)


def compile_kernels(case):
    """Compiles outputs and all gradients."""
    platform_blocks = blocks.find_blocks("gpu", *case.sizes[-2:])
    if not case.is_split:
        platform_blocks = dataclasses.replace(platform_blocks, programs=0)
    ids = segments(case)

    def run(q, k, v, g, beta, state):
        return gated_delta_rule_pallas(
            q,
            k,
            v,
            g,
            beta,
            scale=None,
            initial_state=state,
            segment_ids=ids,
            use_qk_l2norm=True,
            state_dtype=jnp.dtype("float32"),
            chunk_size=64,
            axis_name=None,
            blocks=platform_blocks,
        )

    def outputs_and_gradients(inputs, cotangents):
        outputs, pull = jax.vjp(run, *inputs)
        return *outputs, *pull(cotangents)

    inputs, cotangents, _ = jax.eval_shape(functools.partial(make, case))
    return jax.jit(outputs_and_gradients).lower(inputs, cotangents).compile()


@pytest.fixture(scope="module")
def compiled():
    """Compiles everything at once, on all cores: {name: future of (kernels, recurrence)}."""
    with ThreadPoolExecutor(16) as pool:
        kernels = {name: pool.submit(compile_kernels, case) for name, case in CASES.items()}
        recurrences = {
            name: pool.submit(
                compile_recurrence, *jax.eval_shape(functools.partial(make, CASES[name]))[:2]
            )
            for name in LONG | WIDTHS
        }
        yield kernels, recurrences


def compare(name, compiled):
    """Runs kernels and recurrence; returns both results and the errors {array: [B, H]}."""
    case = CASES[name]
    inputs, cotangents, _ = make(case)
    got = compiled[0][name].result()(inputs, cotangents)
    expected = compiled[1][name].result()(inputs, cotangents, segments(case))
    return got, expected, dict(zip(NAMES, errors_per_head(got, expected), strict=True))


def show(title, rows):
    print(f"\n{title:26}" + "".join(f"{name[:9]:>10}" for name in NAMES))
    for label, values in rows.items():
        print(f"{label:26}" + "".join(f"{x:10.1e}" for x in values))


def cosine(x, y):
    return float(np.vdot(x, y) / (np.linalg.norm(x) * np.linalg.norm(y)))


@pytest.mark.parametrize("name", LONG)
def test_long_sequences(name, compiled):
    got, expected, errors = compare(name, compiled)
    worst = {n: x.max(axis=0) for n, x in errors.items()}
    labels = [*CORNERS, *(f"model head {i}" for i in range(MODEL))]
    show(name, {x: [worst[n][i] for n in NAMES] for i, x in enumerate(labels)})
    limits = LIMITS[CASES[name].dtype]
    too_large = {n: x for n, x in worst.items() if not (x <= limits[n]).all()}
    assert not too_large, too_large

    # The decay's parameters: their gradients are sums over all tokens.
    _, _, parameters = make(CASES[name])
    with jax.enable_x64(True):
        a, a_log, dt_bias = (x.astype(jnp.float64) for x in parameters)
        _, pull = jax.vjp(lambda *x: decays(a, *x), a_log, dt_bias)
        sums = [[np.asarray(x)[-MODEL:] for x in pull(y[5].astype(float))] for y in (got, expected)]
    for label, x, y in zip(("A_log", "dt_bias"), *sums, strict=True):
        print(f"cosine of d{label} to float64: 1 - {1 - cosine(x, y):.1e}")
        assert cosine(x, y) >= 0.9999


@pytest.mark.parametrize("name", LONG)
def test_same_bits_on_repeat(name, compiled):
    inputs, cotangents, _ = make(CASES[name])
    run = compiled[0][name].result()
    first = run(inputs, cotangents)
    for _ in range(3):
        again = run(inputs, cotangents)
        for array, x, y in zip(NAMES, first, again, strict=True):
            assert bool(jnp.array_equal(x, y)), array


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_and_shared_keys(name, compiled):
    _, _, errors = compare(name, compiled)
    worst = {n: float(x.max()) for n, x in errors.items()}
    show("", {name: worst.values()})
    limits = LIMITS[CASES[name].dtype]
    assert all(worst[n] <= limits[n] for n in NAMES), worst


@pytest.mark.parametrize("name", DRAWS)
def test_a_thousand_random_draws_are_finite(name, compiled):
    """Each row and head has its own decay, strength, keys and scale, out to the extremes."""
    case = CASES[name]
    (q, k, v, g, beta, state), cotangents, _ = make(case)
    b, t, h = g.shape
    u = jax.random.uniform(jax.random.key(7), (5, b, 1, h))
    alike = u[0][..., None]
    k = (alike * k[:, :1].astype(jnp.float32) + (1 - alike) * k).astype(k.dtype)
    k = jnp.where(u[1][..., None] < 0.05, 0, k)  # rows of zeros
    scale = (10 ** (6 * u[2][..., None] - 3)).astype(v.dtype)
    beta = jnp.where(u[1] > 0.9, 1.0, beta)
    g = jnp.where(u[3] < 0.05, 0.0, g * 10 ** (8 * u[3] - 5))
    state = state * 10 ** (4 * jnp.moveaxis(u[4], 1, 2)[..., None] - 2)
    result = compiled[0][name].result()((q, k * scale, v * scale, g, beta, state), cotangents)
    for array, x in zip(NAMES, result, strict=True):
        finite = jnp.isfinite(x).all(axis=tuple(range(3, x.ndim)))
        assert bool(finite.all()), (array, int(jnp.sum(~finite)))
