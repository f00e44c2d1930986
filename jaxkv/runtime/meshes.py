"""The mesh of devices that arrays are laid out over."""

import contextlib
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def mesh_of(tree: Any) -> Mesh | None:
    """Return the mesh that the first array of a tree is laid out over, or None."""
    for leaf in jax.tree.leaves(tree):
        # Of what is only being traced, the surrounding program knows the mesh.
        if isinstance(leaf, jax.core.Tracer):
            return None
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
        return None
    return None


def everywhere(tree: Any, mesh: Mesh | None) -> Any:
    """Return a tree of which each device of a mesh has all; None is as it is."""
    if mesh is None:
        return tree
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def under_mesh_of(tree: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which that mesh is set, or one that changes nothing."""
    return under(mesh_of(tree))


def under(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which a mesh is set; None changes nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
