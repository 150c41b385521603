import types

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import (
    backend,
    dplr_delta_rule,
    dplr_delta_rule_step,
    kda,
    kda_step,
    linear_attention,
    linear_attention_step,
)
from kernels_pallas.dispatch import dispatch, preferring


def fast(x):
    if x < 0:
        raise NotImplementedError("x is negative")
    if x == 0:
        raise ValueError("x is zero")
    return "fast"


def slow(x):
    if x == -2:
        raise NotImplementedError("x is -2")
    return "slow"


TABLE = {"fast": fast, "slow": slow}


def test_takes_the_first_that_supports_the_arguments():
    assert dispatch("op", TABLE, None, 1) == "fast"
    assert dispatch("op", TABLE, None, -1) == "slow"
    assert dispatch("op", TABLE, "slow", 1) == "slow"


def test_a_named_one_does_not_fall_back():
    with pytest.raises(ValueError, match="op: implementation='fast' cannot .*: x is negative$"):
        dispatch("op", TABLE, "fast", -1)


def test_wrong_arguments_are_not_a_reason_to_fall_back():
    with pytest.raises(ValueError, match="x is zero"):
        dispatch("op", TABLE, None, 0)


def test_every_reason_is_told():
    with pytest.raises(NotImplementedError, match="op: .*fast: x is negative; slow: x is -2"):
        dispatch("op", TABLE, None, -2)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="op: implementation='quick' .*'fast', 'slow'"):
        dispatch("op", TABLE, "quick", 1)


@pytest.mark.parametrize(
    ("capability", "suits"),
    [("8.0", True), ("9.0", True), ("10.0", True), ("8.6", False), ("8.9", False), ("12.0", False)]
    + [("7.5", False), ("gfx942", False), (None, False)],
)
def test_kernels_are_taken_unnamed_where_their_blocks_fit(capability, suits, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    functions = {"pallas": lambda: "pallas", "xla": lambda: "xla"}
    assert dispatch("op", functions, None) == ("pallas" if suits else "xla")
    assert dispatch("op", functions, "pallas") == "pallas"


def test_a_preferred_one_comes_first_where_it_can():
    with preferring("slow"):
        assert dispatch("op", TABLE, None, 1) == "slow"
        assert dispatch("op", TABLE, "fast", 1) == "fast"  # a name counts more
        with pytest.raises(NotImplementedError, match="slow: x is -2; fast: x is negative"):
            dispatch("op", TABLE, None, -2)
    with preferring("third"):
        assert dispatch("op", TABLE, None, 1) == "fast"
    assert dispatch("op", TABLE, None, 1) == "fast"


def test_kernels_can_be_preferred_where_they_are_not_taken_unnamed():
    table = {"pallas": lambda: "pallas", "xla": lambda: "xla"}
    assert dispatch("op", table, None) == "xla"  # a CPU
    with preferring("pallas"):
        assert dispatch("op", table, None) == "pallas"


def test_a_trace_is_kept_for_its_preference():
    table = {"add": lambda x: x + 1, "multiply": lambda x: x * 3}
    function = jax.jit(lambda x: dispatch("op", table, None, x))
    x = jnp.asarray(5.0)
    assert function(x) == 6
    with preferring("multiply"):
        assert function(x) == 15
    assert function(x) == 6


@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_which_recurrences_take_kernels_unnamed(platform):
    rows, decays = jnp.zeros((1, 64, 1, 64), jnp.bfloat16), jnp.zeros((1, 64, 1, 64))
    state, token = jnp.zeros((1, 1, 64, 64)), (rows[:, 0], rows[:, 0], rows[:, 0])
    beta = jnp.zeros((1, 64, 1))
    calls = {
        "linear_attention": lambda: linear_attention(rows, rows, rows, decays),
        "linear_attention_step": lambda: linear_attention_step(*token, decays[:, 0], state),
        "kda": lambda: kda(rows, rows, rows, decays, beta),
        "kda_step": lambda: kda_step(*token, decays[:, 0], beta[:, 0], state),
        "dplr": lambda: dplr_delta_rule(rows, rows, rows, rows, rows, decays),
        "dplr_step": lambda: dplr_delta_rule_step(
            *token, rows[:, 0], rows[:, 0], decays[:, 0], state
        ),
    }
    with backend.compile_for(platform):
        taken = {name for name, f in calls.items() if "pallas_call" in str(jax.make_jaxpr(f)())}
    assert taken == (set() if platform == "cpu" else set(calls))
