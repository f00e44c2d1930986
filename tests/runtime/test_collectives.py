"""What XLA is told of programs over a mesh: where, and that it hears it."""

import types

import jax
import numpy as np
import pytest

from jaxkv.runtime import collectives, programs
from jaxkv.runtime.programs import Shelf, bounded_jit

GRAPHS = ("xla_gpu_enable_command_buffer", "FUSION")


def mesh_of_two(platform="gpu", *, several_processes=False):
    devices = np.array(2 * [types.SimpleNamespace(platform=platform)])
    return types.SimpleNamespace(
        devices=devices, size=2, is_multi_process=several_processes
    )


def test_several_gpus_of_one_process_are_told(monkeypatch):
    known = True
    monkeypatch.setattr(collectives, "_knows", lambda mesh, told: known)
    told = collectives.compiler_options(mesh_of_two())
    assert {name.removeprefix("xla_gpu_") for name, _ in told} == {
        "experimental_use_collective_kernels",
        "enable_command_buffer",
    }
    others = [
        None,
        jax.make_mesh((1,), ("model",)),
        mesh_of_two("cpu"),
        mesh_of_two("tpu"),
        mesh_of_two(several_processes=True),
    ]
    assert [collectives.compiler_options(mesh) for mesh in others] == 5 * [()]
    known = False  # an older JAX
    assert collectives.compiler_options(mesh_of_two()) == ()


def test_what_this_jax_does_not_know_is_found_out():
    mesh = jax.make_mesh((1,), ("model",))
    with jax.set_mesh(mesh):
        assert collectives._knows(mesh, (GRAPHS,))
        assert not collectives._knows(mesh, (GRAPHS, ("xla_gpu_no_such", "")))
        assert not collectives._knows(mesh, ((GRAPHS[0], "NOTHING_LIKE_IT"),))


def test_xla_is_told_of_programs_over_a_mesh(monkeypatch):
    shelf = Shelf(most=9, most_maps=None)
    asked = []

    @bounded_jit(shelf=shelf, implied=("params",), static_argnames=())
    def add(params, x):
        return params + x

    def told(mesh):
        asked.append(mesh)
        return () if mesh is None else (("xla_gpu_no_such", ""),)

    monkeypatch.setattr(programs, "compiler_options", told)
    mesh = jax.make_mesh((1,), ("model",))
    spread = jax.device_put(np.ones(3), jax.NamedSharding(mesh, jax.P()))
    assert add(np.ones(3), np.ones(3)).tolist() == 3 * [2]
    lowered = add.lower(spread, np.ones(3))
    for call in (
        lambda: add(spread, np.ones(3)),
        lambda: add.compile(spread, np.ones(3)),
        lowered.compile,
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_no_such"):
            call()
    assert len(shelf) == 2 and set(asked) == {None, mesh}
