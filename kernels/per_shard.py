"""Operations under a mesh: every device runs them on its own rows and heads.

Attention needs nothing of another row and nothing of another key/value head, so no
device has to talk to another one. XLA would not find that out: it cannot look into a
Pallas or Triton call, and would gather a cache that is written by a scatter.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

MESH_AXES = {"B": "data", "N": "model", "K": "model"}  # axis letter: axis of the mesh


def per_shard(
    function: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str] | str
) -> Callable[..., Any]:
    """Return `function`, cut along rows and heads under `jax.set_mesh`.

    Args:
      function: of arrays only.
      inputs: axis letters of its arguments, such as `"B K S H"`.
      outputs: axis letters of its results; a string if it returns one array.

    Returns:
      `function` itself where no mesh is set, or inside of another `shard_map`. The mesh
      must have the axes `data` and `model`, which divide rows and key/value heads.
    """
    if current_mesh() is None:
        return function
    if isinstance(outputs, str):
        out_specs = partition_spec(outputs)
    else:
        out_specs = tuple(partition_spec(letters) for letters in outputs)
    return jax.shard_map(
        function if isinstance(outputs, str) else lambda *x: tuple(function(*x)),
        in_specs=tuple(partition_spec(letters) for letters in inputs),
        out_specs=out_specs,
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
