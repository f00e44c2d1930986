"""Run by test_sharding.py, where JAX finds four devices: experts over a mesh.

Prints "equal" where a mesh changes no result and no weights are sent. Takes one
argument: "fast" does the operation, "slow" generates with a network of experts.
"""

import dataclasses
import functools
import re
import sys

import hf_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import sharded_generation
import tiny
from safetensors.numpy import save_file

from jaxkv import sharding
from jaxkv.kernels import experts
from jaxkv.kernels.per_shard import COLUMNS
from jaxkv.models.config import Experts
from jaxkv.models.decoder import Decoder, parameter_shapes
from jaxkv.models.hf.weights import read_weights
from jaxkv.models.parameter_plan import plan_of

COLLECTIVE = re.compile(
    r"= \S+ (all-reduce|all-gather|all-to-all|collective-permute)\("
)


def check_operation(mesh):
    """Raise where the mesh changes a result, or more is sent than one sum."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights = experts.Weights(draw(6, 8, 20), draw(6, 10, 8), draw(6, 20), draw(6, 8))
    chosen, shares = experts.route(draw(4, 5, 6), per_token=2, normalize=True)
    arguments = draw(4, 5, 8), chosen, shares, weights
    for implementation in experts._RUNS.keys() - {"triton"}:  # needs a GPU
        # Not twice the same function: JAX remembers what it traced without the mesh.
        run = functools.partial(
            experts.feed_forward, gate=experts.SILU, implementation=implementation
        )
        alone = jax.jit(run)(*arguments)
        with jax.set_mesh(mesh):
            rows, cut = (
                jax.NamedSharding(mesh, jax.P(axes)) for axes in ("data", COLUMNS)
            )
            spread = jax.device_put(arguments, (rows, rows, rows, partition(cut)))
            program = jax.jit(lambda *x, run=run: run(*x)).lower(*spread).compile()
            found = program(*spread)
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)
        sent = COLLECTIVE.findall(program.as_text())
        assert sent == ["all-reduce"], (implementation, sent)


def partition(cut):
    """Return the partition of all weights."""
    return experts.Weights(*(cut,) * 4)


def check_loading(mesh):
    """Raise where weights that are read onto a mesh are not those of one device."""
    config = dataclasses.replace(
        hf_checkpoints.CONFIG, experts=Experts(count=4, per_token=2, size=6)
    )
    rng = np.random.default_rng(0)
    tensors = hf_checkpoints.hf_tensors(config)
    for name in [name for name in tensors if ".mlp." in name]:
        del tensors[name]
    for parts in plan_of(config).values():
        for name, shape in parts.items():
            if ".mlp." in name:
                tensors[name] = rng.normal(size=shape).astype(np.float32)
    save_file(tensors, hf_checkpoints.MODEL)
    alone = read_weights(".", config, dtype="float32")
    where = sharding.parameter_shardings(parameter_shapes(config), mesh)
    spread = read_weights(".", config, dtype="float32", shardings=where)
    jax.tree.map(np.testing.assert_array_equal, spread, alone)
    held = spread["layer_0"]["experts_down"].addressable_shards
    assert {part.data.shape for part in held} == {(2, 6, 8)}


def check_generation(mesh):
    """Raise where the mesh changes a token."""
    config = dataclasses.replace(
        sharded_generation.CONFIG,
        experts=Experts(count=4, per_token=2, size=16, bias=True),
    )
    network, params = Decoder(config), tiny.parameters(config)
    options = sharded_generation.METHODS["longflow"]
    alone = sharded_generation.run(network, params, options)
    network, params = sharding.spread(network, params, mesh)
    sharded_generation.check(mesh, network, params, options, alone, "experts")


if __name__ == "__main__":
    mesh = sharding.make_mesh(data=2, model=2)
    if sys.argv[1] == "fast":
        check_operation(mesh)
        check_loading(mesh)
    else:
        check_generation(mesh)
    print("equal")
