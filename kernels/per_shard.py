"""Operations under a mesh: every device runs them on its own rows and heads.

Attention needs nothing of another row and nothing of another key/value head, so no
device has to talk to another one. XLA would not find that out: it cannot look into a
Pallas or Triton call, and would gather a cache that is written by a scatter.
"""

import typing
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxkv.kernels.shapes import array_hint, is_record

MESH_AXES = {"B": "data", "N": "model", "K": "model"}  # axis letter: axis of the mesh


def per_shard(function: Callable[..., Any], operation: Any) -> Callable[..., Any]:
    """Return `function`, cut along rows and heads under `jax.set_mesh`.

    Args:
      function: of the arrays of `operation`, in its order and without names.
      operation: whose annotations say which axes they and its result have.

    Returns:
      `function` itself where no mesh is set, or inside of another `shard_map`. The mesh
      must have the axes `data` and `model`, which divide rows and key/value heads.
    """
    if current_mesh() is None:
        return function
    hints = typing.get_type_hints(operation)
    result = hints.pop("return")
    arrays = [hint for hint in hints.values() if is_record(hint) or array_hint(hint)]
    return jax.shard_map(
        function,
        in_specs=tuple(map(_specs, arrays)),
        out_specs=_specs(result),
        check_vma=False,  # the outputs of a Pallas call do not say what they vary over
    )


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """Return the mesh that is set; None without one, or inside of a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.manual_axes else mesh


def devices_per_row() -> int:
    """Return over how many devices the heads of one row are spread."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape.get(MESH_AXES["K"], 1)


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
