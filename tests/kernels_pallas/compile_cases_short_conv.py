"""Shapes of the short convolution to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import short_conv


def _forward(u, w, tail, segment_ids=None):
    return short_conv(u, w, tail=tail, segment_ids=segment_ids, implementation="pallas")


def _gradient(u, w, b=None, segment_ids=None):
    def run(u, w, b):
        return short_conv(u, w, b, segment_ids=segment_ids, implementation="pallas")[0]

    y, pull = jax.vjp(run, u, w, b)
    return y, pull(y)


def _packed_gradient(u, w, segment_ids):
    return _gradient(u, w, segment_ids=segment_ids)


def _shapes(b, t, d, *, w=4, dtype=jnp.bfloat16, bias=False, tail=False, packed=False):
    """Shapes of u, w and perhaps the bias, the tail and segment ids."""
    shape = jax.ShapeDtypeStruct
    arrays = [shape((b, t, d), dtype), shape((w, d), dtype)]
    arrays += [shape((d,), dtype)] * bias + [shape((b, w - 1, d), dtype)] * tail
    return *arrays, *[shape((b, t), jnp.int32)] * packed


CASES = [  # a gradient compiles the forward kernel too
    ("short_conv gradient", _gradient, _shapes(8, 8192, 3072)),
    ("short_conv gradient, packed", _packed_gradient, _shapes(8, 8192, 3072, packed=True)),
    ("short_conv, tail, packed", _forward, _shapes(8, 8192, 3072, tail=True, packed=True)),
    (
        "short_conv, tail, packed, T=262144",
        _forward,
        _shapes(1, 262144, 3072, tail=True, packed=True),
    ),
]
# Other numbers of taps and channels, T that no tile divides, and float32.
WIDTHS = [
    (f"short_conv gradient, T={t} D={d} W={w} {name}", _gradient, shapes)
    for t, d, w, name in (
        (1000, 2064, 3, "bfloat16"),
        (1000, 960, 8, "float32"),
    )
    for shapes in [_shapes(2, t, d, w=w, dtype=jnp.dtype(name), bias=True, packed=True)]
]
