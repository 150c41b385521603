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
from gated_delta_corners import CORNERS, MODEL, Case, decays, make
from kernel_oracles import LIMITS, NAMES

from kernels_pallas.gated_delta_rule import blocks, drivers
from kernels_pallas.gated_delta_rule.pallas import gated_delta_rule_pallas

pytestmark = pytest.mark.gpu

LONG = {
    f"{dtype}, T={sizes[1]}{', packed' * packed}": Case(dtype, sizes, packed, packed)
    for dtype in LIMITS
    for sizes, packed in (((1, 4096, 12, 12, 96, 256), False), ((2, 8209, 12, 12, 96, 256), True))
}
WIDTHS = {
    f"{dtype}, K={k} V={v}": Case(dtype, (2, 200, 2, 4, k, v))
    for dtype in LIMITS
    for k, v in ((64, 64), (96, 144), (128, 256), (192, 288), (256, 576))
    if dtype == "bfloat16" or k < 128  # wider float32 keys are XLA's
}
DRAWS = {f"{d}, draws": Case(d, (125, 130, 8, 8, 96, 128)) for d in LIMITS}
CASES = LONG | WIDTHS | DRAWS
TRITON = ", Triton"  # the same case by the other driver
LONG |= {name + TRITON: case for name, case in LONG.items() if case.dtype == "bfloat16"}
WIDTHS |= {
    name + TRITON: case
    for name, case in WIDTHS.items()
    if case.dtype == "bfloat16" and case.sizes[4] in drivers.KEY_WIDTHS
}
DRAWS |= {name + TRITON: case for name, case in DRAWS.items() if case.dtype == "bfloat16"}
CASES |= LONG | WIDTHS | DRAWS


def segments(case):
    """Documents of 1 to thousands of tokens, with padding before, between and after them."""
    if not case.packed:
        return None
    lengths = [9, 3000, 1, 7, 200, 64, 100, 4096, 63, 669]
    ids = np.repeat([0, 1, 2, 0, 3, 4, 5, 6, 7, 0], lengths)
    return np.stack([ids, np.ones_like(ids)]).astype(np.int32)


def compile_kernels(case, driver):
    """Compiles outputs and all gradients."""
    platform_blocks = blocks.find_blocks("gpu", case.sizes[-2])
    platform_blocks = dataclasses.replace(platform_blocks, driver=driver)
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


def without_triton():
    """Says why the Triton driver cannot run here, or returns None."""
    try:
        drivers.choose(blocks.Blocks(driver="triton"), jnp.bfloat16, 96)
    except ValueError as error:
        return str(error)


@pytest.fixture(autouse=True)
def skip_without_triton(name):
    if TRITON in name and (reason := without_triton()):
        pytest.skip(reason)


@pytest.fixture(scope="module")
def compiled(request):
    """Compiles what the chosen tests need at once, on all cores: futures by name and by sizes."""
    chosen = [x for x in request.session.items if "compiled" in getattr(x, "fixturenames", ())]
    names = {x.callspec.params["name"] for x in chosen}
    cases = {x: CASES[x] for x in sorted(names) if TRITON not in x or not without_triton()}
    exact = {case.sizes for name, case in cases.items() if name not in DRAWS}
    with ThreadPoolExecutor(16) as pool:
        recurrences = {sizes: pool.submit(compile_recurrence, sizes) for sizes in exact}
        kernels = {
            name: pool.submit(compile_kernels, case, "triton" if TRITON in name else "pallas")
            for name, case in cases.items()
        }
        yield kernels, recurrences


def compare(name, compiled):
    """Runs kernels and recurrence; returns both results and the errors {array: [B, H]}."""
    case = CASES[name]
    inputs, cotangents, _ = make(case)
    got = compiled[0][name].result()(inputs, cotangents)
    expected = compiled[1][case.sizes].result()(inputs, cotangents, segments(case))
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
    # The decay's parameters: their gradients are sums over all tokens.
    _, _, parameters = make(CASES[name])
    with jax.enable_x64(True):
        a, a_log, dt_bias = (x.astype(jnp.float64) for x in parameters)
        _, pull = jax.vjp(lambda *x: decays(a, *x), a_log, dt_bias)
        sums = [[np.asarray(x)[-MODEL:] for x in pull(y[5].astype(float))] for y in (got, expected)]
    for label, x, y in zip(("A_log", "dt_bias"), *sums, strict=True):
        print(f"cosine of d{label} to float64: 1 - {1 - cosine(x, y):.1e}")
        assert cosine(x, y) >= 0.9999
    limits = LIMITS[CASES[name].dtype]
    too_large = {n: x for n, x in worst.items() if not (x <= limits[n]).all()}
    assert not too_large, too_large


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
    over = {n: worst[n] for n in NAMES if not worst[n] <= limits[n]}
    if CASES[name].dtype == "bfloat16" and CASES[name].sizes[-1] == 64 and set(over) == {"dg"}:
        pytest.xfail(f"known miss: dg {over['dg']:.1e} at g = 0, beta = 1 and 64 columns of V")
    assert not over, worst


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
