"""Rows and heads over several devices: the partition, and that nothing changes."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxkv import sharding
from jaxkv import state as kv
from jaxkv.kernels import dispatch, pointwise
from jaxkv.kernels.cache import Token
from jaxkv.kernels.per_shard import partition_spec, per_shard
from jaxkv.models.decoder import parameter_shapes

FOLDER = Path(__file__).parent
CONFIG = dataclasses.replace(
    tiny.CONFIG, vocab_size=64, tied=False, qkv_bias=True, output_bias=True
)


def test_every_parameter_has_a_partition():
    specs = sharding.parameter_specs(parameter_shapes(CONFIG))
    layer = specs["layer_1"]
    assert layer["qkv"] == layer["gate_up"] == P(None, "model")
    assert layer["output"] == layer["down"] == specs["embedding"] == P("model", None)
    assert specs["head"] == P(None, "model")
    assert layer["qkv_bias"] == P("model")
    for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "output_bias"):
        assert layer[name] == P(None)


def test_a_parameter_that_declares_no_axes_is_refused():
    params = parameter_shapes(CONFIG)
    params["layer_1"]["router"] = params["layer_1"]["down"]
    with pytest.raises(ValueError, match="no mesh axes for the parameter 'router'"):
        sharding.parameter_specs(params)


def test_a_state_is_cut_along_rows_and_heads():
    state = kv.init(batch=2, kv_heads=2, slots=4, head_dim=8, dtype="float32")
    state = dataclasses.replace(state, memory={"seen": jnp.zeros((2, 4))})
    specs = sharding.state_specs(state)
    assert specs.keys == specs.values == P("data", "model", None, None)
    assert specs.positions == P("data", "model", None)
    assert specs.target == P("data", "model")
    assert specs.memory == {"seen": P("data")}
    assert partition_spec("B T K H") == P("data", None, "model", None)


@pytest.mark.parametrize(
    ("changes", "batch", "match"),
    [
        ({}, 3, "3 rows do not divide over 2 devices of the mesh axis 'data'"),
        ({"num_kv_heads": 3}, 4, "3 key/value heads"),
        ({"intermediate_size": 49}, 4, "49 feed-forward columns"),
        ({"vocab_size": 61}, 4, "61 entries of the vocabulary"),
    ],
)
def test_sizes_must_divide(changes, batch, match):
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "model"))
    sharding.check(CONFIG, mesh, batch=4)
    with pytest.raises(ValueError, match=match):
        sharding.check(dataclasses.replace(CONFIG, **changes), mesh, batch=batch)


def test_an_operation_is_cut_as_its_annotations_say():
    Pairs = Float[Array, "B N"]

    def operation(x: Pairs, token: Token, *, scale: float) -> tuple[Pairs, Token]: ...

    def double(x, token):
        return 2 * x, token._replace(value=None)

    assert per_shard(double, operation) is double  # no mesh is set
    new = jnp.ones((3, 2, 4))
    token = Token(new, new, jnp.zeros(3, jnp.int32))
    with jax.set_mesh(sharding.make_mesh()):
        jaxpr = jax.make_jaxpr(per_shard(double, operation))(jnp.ones((3, 2)), token)
    (equation,) = jaxpr.eqns
    heads, rows = P("data", "model", None), P("data")
    assert equation.params["in_specs"] == (P("data", "model"), heads, heads, rows)
    assert equation.params["out_specs"] == (P("data", "model"), heads, rows)


@pytest.mark.parametrize(
    ("model", "best"), [(1, "triton"), (2, "xla")], ids=["alone", "spread"]
)
def test_no_weights_are_gathered_for_triton(model, best, monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    assert pointwise.choose(True) == "triton"
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = AbstractMesh((1, model), ("data", "model"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        assert pointwise.choose(True) == best
        inside = []
        jax.eval_shape(
            jax.shard_map(
                lambda x: inside.append(pointwise.choose(True)) or x,
                in_specs=P("data", "model"),
                out_specs=P("data", "model"),
            ),
            jax.ShapeDtypeStruct((2, 2), jnp.float32),
        )
    assert inside == ["triton"]


@pytest.mark.parametrize(
    "which", ["fast", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_operations_stay_on_their_devices(tmp_path, which):
    """Equal results, and nothing sent but what a shared victim needs."""
    assert over_four_devices(tmp_path, "sharded_operations.py", which) == "equal"


@pytest.mark.slow
def test_generation_over_four_devices(tmp_path):
    assert over_four_devices(tmp_path, "sharded_generation.py") == "equal"


def over_four_devices(folder, program, *arguments):
    """Run a program beside this file where JAX finds four devices; return its output.

    In an interpreter of its own, because the number of devices is fixed at the start.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    run = subprocess.run(
        [sys.executable, FOLDER / program, *arguments],
        cwd=folder,
        env=dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            PYTHONPATH=str(FOLDER.parent),
            XLA_FLAGS=f"{flags} --xla_force_host_platform_device_count=4",
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
