"""Device mesh and the one table that says how every array is split over it.

The mesh has three axes:

* `data`: batch rows, weights replicated;
* `fsdp`: batch rows too, and every weight split once more (gathered where it is used);
* `tensor`: heads, MLP width and vocabulary.

`RULES` maps a weight's dotted path to a `PartitionSpec`. The same table serves parameters,
optimizer moments (their paths end alike), restore targets and stacked weights (a leading axis
beyond the rule's rank is not split). Modules know nothing of devices; they only call `constrain`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

P = PartitionSpec
AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# (name, path regex, spec of the trailing dimensions); the first match wins.
RULES: tuple[tuple[str, str, PartitionSpec], ...] = (
    ("embedding", r"embed_tokens\.embedding", P("tensor", "fsdp")),  # [E, D]
    ("head", r"lm_head\.kernel", P("fsdp", "tensor")),  # [D, E]
    ("mlp in", r"mlp\.(gate|up)_proj\.kernel", P("fsdp", "tensor")),  # [D, F]
    ("mlp out", r"mlp\.down_proj\.kernel", P("tensor", "fsdp")),  # [F, D]
    ("heads in", r"([qkvgbar]|in)_proj\.kernel", P("fsdp", "tensor")),  # [D, heads * width]
    ("heads out", r"(o|out)_proj\.kernel", P("tensor", "fsdp")),  # [heads * width, D]
    # As with the generator below: the bottleneck is narrow and whole, the output split by channel.
    ("low rank in", r"\w+_(proj|lora)\.down\.kernel", P("fsdp", None)),  # [D, R]
    ("low rank out", r"\w+_(proj|lora)\.up\.kernel", P("fsdp", "tensor")),  # [R, heads * width]
    ("conv taps", r"(\w_)?conv1d\.taps", P(None, "tensor")),  # [W, channels]
    # The generator's bottleneck is narrow, so it is computed whole; only w2 is split by channel.
    ("generator in", r"(\w+_)?generator\.w1", P("fsdp", None)),  # [D, R]
    ("generator out", r"(\w+_)?generator\.w2", P("fsdp", None, "tensor")),  # [R, W, VD]
    ("generator taps", r"(\w+_)?generator\.b2", P(None, "tensor")),  # [W, VD]
    ("replicated", r".*", P()),  # norms, biases, A_log, dt_bias and other vectors, counters
)
REPLICATED_LIMIT = 2**16  # elements that the last rule takes without complaint

_LETTERS: Mapping[str, tuple[str, ...]] = {
    "b": BATCH_AXES,  # batch
    "t": (),  # time
    "s": (),  # keys
    "d": (),  # model width
    "h": ("tensor",),  # heads
    "n": ("tensor",),  # KV heads
    "k": (),  # width of a head
    "v": (),  # value width of a head
    "f": ("tensor",),  # MLP width
    "e": ("tensor",),  # vocabulary
}


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """Builds the mesh `data` x `fsdp` x `tensor`; one size may be -1 and takes what is left.

    Args:
      data: size of the `data` axis, or -1.
      fsdp: size of the `fsdp` axis, or -1.
      tensor: size of the `tensor` axis, or -1.
      devices: devices to use, all of them; the default is `jax.devices()`.

    Returns:
      A `Mesh` with axes `("data", "fsdp", "tensor")`, all of type Auto.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    given = " x ".join(f"{name}={size}" for name, size in sizes.items())
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh {given}: sizes must be positive, and at most one may be -1.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    elif open_axes or known != len(devices):
        hint = "" if open_axes else ", or set one of them to -1"
        raise ValueError(
            f"mesh {given} does not fit {len(devices)} devices: the sizes must "
            f"{'divide' if open_axes else 'multiply to'} {len(devices)}{hint}."
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """How one array lies on a mesh.

    Attributes:
      rule: name of the rule in `RULES` that matched.
      spec: the resulting `PartitionSpec`.
      dropped: `(mesh axis, dimension)` pairs that the rule asks for but that do not divide.
    """

    rule: str
    spec: PartitionSpec
    dropped: tuple[tuple[str, int], ...] = ()


def placement(path: str, shape: Sequence[int], mesh: Mesh) -> Placement:
    """Finds the rule for one array and fits it to the array's shape.

    Args:
      path: dotted path, for example `layers.3.mixer.q_proj.kernel`.
      shape: the array's shape; leading axes beyond the rule's rank are not split.
      mesh: the mesh.

    Returns:
      The `Placement`; a mesh axis that does not divide its dimension is left out there.

    Raises:
      ValueError: if a large array is caught by no named rule.
    """
    for name, pattern, spec in RULES:
        # A rule names the end of a path, so that it also serves the optimizer's moments.
        if not re.search(rf"(^|\.)({pattern})$", path):
            continue
        if name == "replicated" and len(shape) > 1 and math.prod(shape) > REPLICATED_LIMIT:
            raise ValueError(
                f"no sharding rule for {path} of shape {tuple(shape)}: an array of more than "
                f"{REPLICATED_LIMIT} elements needs a named rule in jet_jax/sharding.py RULES."
            )
        if len(shape) < len(spec):  # a factored or scalar companion of the weight
            return Placement(name, P())
        entries = [None] * (len(shape) - len(spec)) + list(spec)
        dropped = []
        for i, axis in enumerate(entries):
            if axis is not None and shape[i] % mesh.shape[axis]:
                dropped.append((axis, shape[i]))
                entries[i] = None
        return Placement(name, P(*entries), tuple(dropped))
    raise AssertionError("the last rule matches everything")


def dotted(path: Sequence[Any]) -> str:
    """Renders a JAX key path as a dotted string: dict keys, attributes and indices alike."""
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Gives every array of a tree its `NamedSharding` by `RULES`.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s: parameters (nested or flat dotted dict), optimizer
        state, a whole train state.
      mesh: the mesh.

    Returns:
      A tree of the same structure with a `NamedSharding` at each leaf.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, placement(dotted(path), x.shape, mesh).spec), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: rows over `data` and `fsdp`, everything else whole."""
    return NamedSharding(mesh, P(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Number of pieces that a batch is split into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> None:
    """Raises ValueError unless a global batch divides over the mesh and the accumulation steps."""
    shards = batch_shards(mesh)
    unit = shards * accumulation
    if batch_size % unit:
        below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
        sizes = f"{below} or {above}" if below else f"{above}"
        fits = [n for n in range(1, shards + 1) if batch_size % (n * accumulation) == 0]
        choice = f", or mesh data x fsdp to one of {fits}" if fits else ""
        raise ValueError(
            f"batch_size={batch_size} is not divisible by {unit} (mesh data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']} x accumulation={accumulation}); "
            f"set batch_size to {sizes}{choice}."
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Places this process's rows of a global batch on the mesh.

    Args:
      batch: arrays [rows, ...]; each process holds its own rows.
      mesh: the mesh.

    Returns:
      Global arrays, rows split by `batch_sharding`.
    """
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def constrain(x: Array, dims: str) -> Array:
    """Pins an activation to the mesh set by `jax.set_mesh`; without one it does nothing.

    Args:
      x: the activation.
      dims: one letter for each dimension, for example `"btd"` or `"bthk"`: b batch, t time,
        s keys, d model width, h heads, n KV heads, k and v head widths, f MLP width, e vocabulary.

    Returns:
      `x` with a sharding constraint. Axes that do not divide, and axes that an enclosing
      `shard_map` handles, are left out.
    """
    assert len(dims) == x.ndim, (dims, x.shape)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    auto = {n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Auto}
    if not auto.issuperset(AXES):
        return x
    entries = []
    for letter, size in zip(dims, x.shape, strict=True):
        axes = _LETTERS[letter]
        fits = bool(axes) and size % math.prod(mesh.shape[a] for a in axes) == 0
        entries.append(axes if fits else None)
    return jax.lax.with_sharding_constraint(x, P(*entries))


def shard_kernel(
    function: Callable[..., PyTree], dims: Sequence[str | None], out_dims: str | tuple[str, ...]
) -> Callable[..., PyTree]:
    """Runs a hand-written kernel on each device's own rows and heads.

    A compiler cannot split a Pallas kernel, so under the mesh set by `jax.set_mesh` the function is
    wrapped in `shard_map`; without a mesh it is returned as it is. The one place where kernels meet
    the mesh.

    Args:
      function: takes as many arrays as `dims` has entries, and works row by row and head by head.
      dims: for each argument the letters of `constrain`, or None for one that is None.
      out_dims: the same for the result, or for each of several.

    Returns:
      The function over global arrays. An axis is used only if it divides every argument's dimension
      that asks for it, so heads and KV heads are always split alike.
    """

    def wrapped(*args: Array | None) -> PyTree:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or not set(AXES) <= set(mesh.axis_names):
            return function(*args)
        present = [(a, d) for a, d in zip(args, dims, strict=True) if a is not None and d]

        def usable(axes: tuple[str, ...]) -> bool:
            sizes = [
                size
                for array, letters in present
                for letter, size in zip(letters, array.shape, strict=True)
                if _LETTERS[letter] == axes
            ]
            return all(size % math.prod(mesh.shape[a] for a in axes) == 0 for size in sizes)

        def spec(letters: str | None) -> PartitionSpec:
            axes = [_LETTERS[letter] for letter in letters or ""]
            return P(*(a if a and usable(a) else None for a in axes))

        return jax.shard_map(
            function,
            in_specs=tuple(
                spec(d) if a is not None else None for a, d in zip(args, dims, strict=True)
            ),
            out_specs=jax.tree.map(spec, out_dims),
            check_vma=False,
        )(*args)

    return wrapped


def current_batch_shards(batch: int) -> int:
    """Pieces that `batch` rows are split into under the mesh in force; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(axis not in mesh.shape for axis in BATCH_AXES):
        return 1
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return shards if batch % shards == 0 else 1


def tensor_shards() -> int:
    """Size of the tensor axis of the mesh in force; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get("tensor", 1)
