"""Operations under a mesh: every device runs them on its own rows and heads.

Attention needs nothing of another row and nothing of another key/value head, so no
device has to talk to another one. XLA would not find that out: it cannot look into a
Pallas or Triton call, and would gather a cache that is written by a scatter.

A mesh has three axes. `data` shares out the rows of a batch and `model` the heads of a
row. Where there are more devices than key/value heads, `copies` says how many hold the
same heads; what else a row's devices share out, such as columns of the feed-forward and
entries of the vocabulary, is cut over `model` and `copies` together. Rows that do not
divide over `data` are all computed everywhere: right, but no faster.
"""

import typing
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxkv.kernels.shapes import array_hint, is_record

DATA, MODEL, COPIES = AXES = ("data", "model", "copies")
COLUMNS = (MODEL, COPIES)  # the axes of all devices of a row

# Bytes that a device may hear of the others where a sum is read in parts; see
# `parts_of_row`.
MOST_HEARD = 256 * 1024

# Axis letter: axes of the mesh. `Q` are columns of heads, fused or not, `E` experts.
MESH_AXES = {
    "B": DATA,
    "N": MODEL,
    "K": MODEL,
    "Q": MODEL,
    "F": COLUMNS,
    "V": COLUMNS,
    "E": COLUMNS,
}


def per_shard(function: Callable[..., Any], operation: Any) -> Callable[..., Any]:
    """Return `function`, cut along rows and heads under `jax.set_mesh`.

    Args:
      function: of the arrays of `operation`, in its order and without names.
      operation: whose annotations say which axes they and its result have.

    Returns:
      `function` itself where no mesh is set, or inside of another `shard_map`. The mesh
      must have the axes `AXES`, which divide what `MESH_AXES` says.
    """
    if current_mesh() is None:
        return function
    hints = typing.get_type_hints(operation)
    result = hints.pop("return")
    arrays = [hint for hint in hints.values() if is_record(hint) or array_hint(hint)]
    return _mapped(function, tuple(map(_specs, arrays)), _specs(result))


def along(
    function: Callable[..., Any], inputs: tuple[str, ...], output: str
) -> Callable[..., Any]:
    """Return `function`, cut along the named axes under `jax.set_mesh`.

    For operations that are cut in more than one way, whose annotations cannot say it.

    Args:
      function: of arrays.
      inputs: the axis letters of each.
      output: of the result.
    """
    if current_mesh() is None:
        return function
    return _mapped(function, tuple(map(partition_spec, inputs)), partition_spec(output))


def _mapped(function, inputs, output):
    def run(*arrays):
        specs = inputs[: len(arrays)], output  # the last may be left out
        if not _rows_divide(specs[0], arrays):
            specs = jax.tree.map(_all_rows, specs, is_leaf=_is_spec)
        return jax.shard_map(
            function,
            in_specs=specs[0],
            out_specs=specs[1],
            check_vma=False,  # a Pallas call's outputs do not say what they vary over
        )(*arrays)

    return run


def _rows_divide(inputs, arrays) -> bool:
    """Return whether the rows of all arrays divide over the devices that share them."""

    def divides(spec, arrays):
        return all(
            size % _size(DATA) == 0
            for array in jax.tree.leaves(arrays)
            for axis, size in zip(spec, array.shape, strict=False)
            if axis == DATA
        )

    found = jax.tree.map(divides, inputs, arrays, is_leaf=_is_spec)
    return all(jax.tree.leaves(found))


def _is_spec(x) -> bool:
    return isinstance(x, PartitionSpec)


def _all_rows(spec):
    return PartitionSpec(*(None if axis == DATA else axis for axis in spec))


def everywhere(tree: Any) -> Any:
    """Return arrays of which every device has all, so that any host can read them."""
    if current_mesh() is None:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Return the mesh that is set; None without one, or inside of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def no_mesh() -> AbstractContextManager[Any]:
    """Return a context in which no mesh is set."""
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def devices_per_row() -> int:
    """Return over how many devices the heads of one row are spread."""
    return _size(MODEL)


def columns_per_row() -> int:
    """Return over how many devices the columns of one row are spread."""
    return _size(MODEL) * _size(COPIES)


def _size(axis: str) -> int:
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape.get(axis, 1)


def add_up(parts: jax.Array) -> jax.Array:
    """Return the sum over the devices of a row, inside of what `along` has mapped."""
    return jax.lax.psum(parts, COLUMNS)


def parts_of_row(part: jax.Array, devices: int) -> jax.Array:
    """Return `[P, ...]`, whose sum over `P` is the sum over the devices of a row.

    Few numbers are left in parts, one of each device in their order: whoever reads them
    adds them, and each device gets the same bits. That saves a way there and back, but
    a device hears `devices - 1` times what it says, where a sum is twice of it at most.
    On two H200s parts were faster by 1.6 us for 64 KB and slower by 1.9 for 512 KB, as
    whole steps tell; between them lies 270 KB (`2026-11-28-mesh-ways-qwen3-8b-h200`).
    On TPUs, where nothing was measured, XLA sums.

    Args:
      part: of this device, inside of what `along` has mapped.
      devices: of a row, `columns_per_row()` outside of it.
    """
    if devices == 1:
        return part[None]
    if (devices - 1) * part.nbytes > MOST_HEARD or jax.default_backend() == "tpu":
        return add_up(part)[None]
    return jax.lax.all_gather(part, COLUMNS)


def mean_over_heads(part: jax.Array) -> jax.Array:
    """Return the mean over the devices that share out heads, likewise."""
    return jax.lax.pmean(part, MODEL)


def all_columns(part: jax.Array, *, axis: int) -> jax.Array:
    """Return what all devices of a row hold, side by side along an axis."""
    return jax.lax.all_gather(part, COLUMNS, axis=axis, tiled=True)


def first_of_shard(size: int) -> jax.Array:
    """Return the index of this device's first column, where each has `size`; int32."""
    return jax.lax.axis_index(COLUMNS).astype(jnp.int32) * size


def partition_spec(letters: str) -> PartitionSpec:
    """Return how an array with these axes is cut: `"B S"` is `P("data", None)`."""
    return PartitionSpec(*(MESH_AXES.get(letter) for letter in letters.split()))


def _specs(hint: Any) -> Any:
    """Return how what is annotated so is cut, in its structure."""
    if is_record(hint):
        return hint(*map(_specs, typing.get_type_hints(hint).values()))
    if typing.get_origin(hint) is tuple:
        return tuple(map(_specs, typing.get_args(hint)))
    return partition_spec(array_hint(hint).dim_str)
