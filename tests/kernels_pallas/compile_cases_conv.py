"""Shapes of the dynamic convolution to compile ahead of time: (name, function, argument shapes)."""

import jax
import jax.numpy as jnp

from kernels_pallas import dynamic_conv


def _forward(u, h, w2, b2, tail, segment_ids=None):
    return dynamic_conv(u, h, w2, b2, tail=tail, segment_ids=segment_ids, implementation="pallas")


def _gradient(u, h, w2, b2, segment_ids=None):
    def run(u, h, w2, b2):
        return dynamic_conv(u, h, w2, b2, segment_ids=segment_ids, implementation="pallas")[0]

    v, pull = jax.vjp(run, u, h, w2, b2)
    return v, pull(v)


def _shapes(b, t, d, r, w=4, dtype=jnp.bfloat16, tail=False, packed=False):
    """Shapes of u, h, w2, b2 and perhaps the tail and segment ids."""
    shape = jax.ShapeDtypeStruct
    arrays = [shape(s, dtype) for s in ((b, t, d), (b, t, r), (r, w, d), (w, d))]
    arrays += [shape((b, w - 1, d), dtype)] * tail
    return *arrays, *[shape((b, t), jnp.int32)] * packed


JET_2B, JET_4B = (3072, 384), (4096, 512)
CASES = [  # a gradient compiles the forward kernel too
    ("dynamic_conv gradient, 2B", _gradient, _shapes(8, 8192, *JET_2B)),
    ("dynamic_conv gradient, 4B, packed", _gradient, _shapes(4, 8192, *JET_4B, packed=True)),
    (
        "dynamic_conv, 4B, tail, packed",
        _forward,
        _shapes(8, 8192, *JET_4B, tail=True, packed=True),
    ),
    ("dynamic_conv, 2B, T=262144", _forward, _shapes(1, 262144, *JET_2B, tail=True)),
]
# Other numbers of taps and channels, T that no tile divides, and float32.
WIDTHS = [
    (f"dynamic_conv gradient, T={t} D={d} R={r} W={w} {name}", _gradient, shapes)
    for t, d, r, w, name in (
        (1000, 192, 16, 3, "bfloat16"),
        (1000, 576, 48, 8, "bfloat16"),
        (1024, 3072, 384, 4, "float32"),
        (1000, 960, 128, 2, "float32"),
    )
    for shapes in [_shapes(2, t, d, r, w, jnp.dtype(name))]
]
