"""Options that the recorded layers leave at their defaults, against float64 programs in numpy."""

import jax
import jax.numpy as jnp
import layer_programs
import numpy as np
import pytest
from flax import nnx
from recurrent_cases import WIDTH, make, random, relative

from jet_jax.hf_mixers import mixer_state_dict
from jet_jax.mixer_options import OPTIONS
from jet_jax.mixers.context import Context

VARIANTS = [
    ("retnet", {"num_heads": 4, "num_kv_heads": 2, "gate_fn": "sigmoid", "expand_v": 1.5}),
    ("retnet", {"num_heads": 2, "use_output_gate": False, "use_short_conv": True,
                "conv_bias": True}),
    ("retnet", {"num_heads": 2, "fuse_norm": False, "norm_eps": 1e-2}),
    ("gla", {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "clamp_min": -0.04,
             "gate_fn": "relu"}),
    ("gla", {"num_heads": 2, "gate_low_rank_dim": 3, "gate_logit_normalizer": 2,
             "use_short_conv": True, "conv_size": 3, "gate_fn": "gelu"}),
    ("deltanet", {"num_heads": 2, "use_gate": True, "qk_activation": "elu", "qk_norm": "sum",
                  "conv_bias": True}),
    ("deltanet", {"num_heads": 3, "use_beta": False, "use_short_conv": False,
                  "qk_activation": "relu", "expand_v": 0.5}),
    ("deltanet", {"num_heads": 3, "allow_neg_eigval": True, "qk_activation": "identity"}),
    ("gdn", {"num_heads": 2, "num_v_heads": 4, "head_dim": 6, "allow_neg_eigval": True,
             "output_gate_activation": "sigmoid"}),
    ("gdn", {"num_heads": 3, "head_dim": 8, "use_gate": False, "use_short_conv": False}),
    ("mamba2", {"head_dim": 4, "state_size": 6, "n_groups": 3, "norm_before_gate": True,
                "use_bias": True}),
    ("mamba2", {"head_dim": 8, "state_size": 6, "n_groups": 2, "conv_kernel": 3}),
    ("mamba2", {"head_dim": 8, "num_heads": 3, "expand": 1, "state_size": 6, "rmsnorm": False,
                "D_has_hdim": True, "use_conv_bias": False, "dt_limit": (0.3, 0.9)}),
    ("rwkv7", {"head_dim": 8, "fuse_norm": True, "decay_low_rank_dim": 3}),
    ("rwkv7", {"head_dim": None, "num_heads": 2, "value_dim": 16, "norm_eps": 1e-3}),
    ("kda", {"num_heads": 2, "num_v_heads": 4, "head_dim": 6, "expand_v": 1.5,
             "allow_neg_eigval": True}),
    ("kda", {"num_heads": 3, "head_dim": 8, "safe_gate": True, "lower_bound": -2.0,
             "use_short_conv": False}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"), VARIANTS, ids=[f"{k}-{'-'.join(map(str, o))}" for k, o in VARIANTS]
)
def test_variants(kind, options):
    config, graphdef, params = make(kind, options)
    mixer = nnx.merge(graphdef, params)
    weights = {name: np.asarray(a, np.float64) for name, a in mixer_state_dict(mixer).items()}
    x = random(3, 1, 9, WIDTH)
    positions = jnp.arange(9, dtype=jnp.int32)[None]
    run = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, Context(None, positions))[0])
    program = getattr(layer_programs, kind)
    expected = program(np.asarray(x[0], np.float64), weights, config.options(kind))
    assert relative(run(params, x)[0], expected) < 3e-6


ERRORS = [
    ("retnet", {"num_heads": 5}, "hidden_size * expand_k = 24 is not divisible by num_heads=5"),
    ("retnet", {"num_heads": 8}, "hidden_size * expand_k / num_heads = 3 is odd"),
    ("retnet", {"num_heads": 4, "num_kv_heads": 3}, "not divisible by num_kv_heads=3"),
    ("retnet", {"num_heads": 4, "gate_fn": "tanh"}, "gate_fn='tanh' is unknown; use one of"),
    ("gla", {"expand_v": 0.3}, "hidden_size * expand_v = 7.1"),
    ("gla", {"clamp_min": 0.5}, "clamp_min=0.5 bounds log decays"),
    ("gla", {"gate_low_rank_dim": 0}, "gate_low_rank_dim=0 must be an integer of at least 1"),
    ("deltanet", {"qk_norm": "l1"}, "qk_norm='l1' is unknown; use one of 'l2', 'sum'"),
    ("deltanet", {"conv_size": 1}, "conv_size=1 must be at least 2"),
    ("deltanet", {"norm_eps": 0}, "norm_eps=0.0 must be positive"),
    ("gdn", {"num_heads": 2, "num_v_heads": 3}, "num_v_heads=3 is not a multiple of num_heads=2"),
    ("gdn", {"head_dim": 8, "expand_v": 1.3}, "head_dim * expand_v = 10.4 is not an integer"),
    ("gdn", {"use_gates": True}, "unknown key 'use_gates' in mixers['gdn']; did you mean"),
    ("mamba2", {"head_dim": 10}, "expand * hidden_size = 48 is not divisible by head_dim=10"),
    ("mamba2", {"head_dim": 8, "num_heads": 4}, "num_heads=4, but expand * hidden_size / head_dim"),
    ("mamba2", {"head_dim": 8, "n_groups": 4}, "the 6 heads are not divisible by n_groups=4"),
    ("mamba2", {"head_dim": 8, "dt_limit": (1.0, 0.5)}, "0 <= lowest <= highest"),
    ("rwkv7", {"head_dim": 7}, "hidden_size=24 is not divisible by head_dim=7"),
    ("rwkv7", {"head_dim": None}, "rwkv7 needs head_dim or num_heads"),
    ("rwkv7", {"head_dim": 8, "num_heads": 4}, "num_heads=4, but hidden_size / head_dim = 3"),
    ("rwkv7", {"head_dim": 8, "value_dim": 20}, "value_dim=20 is not divisible by the 3 heads"),
    ("kda", {"safe_gate": True}, "safe_gate=True needs lower_bound"),
    ("kda", {"safe_gate": True, "lower_bound": 1.0}, "lower_bound=1.0 bounds log decays"),
]


@pytest.mark.parametrize(("kind", "options", "message"), ERRORS)
def test_errors_say_what_to_change(kind, options, message):
    with pytest.raises(ValueError) as error:
        make(kind, options)
    assert message in str(error.value)


@pytest.mark.parametrize("kind", sorted(vars(layer_programs).keys() & OPTIONS.keys()))
def test_published_defaults_fit_a_model(kind):
    """The options are the published layer's when none is given."""
    options = OPTIONS[kind]()
    options.check(2048)
    assert options.param_count(2048) > 2048**2
