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

# Run by an interpreter of its own: the number of devices is fixed at the start.
OPERATIONS = r"""
import functools, re, sys
import jax, jax.numpy as jnp, numpy as np
from jaxkv import sharding
from jaxkv.kernels import decode, dispatch, longflow, longflow_tpu
from jaxkv.kernels import window_scores as windows
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.per_shard import partition_spec
from jaxkv.kernels.scores import value_norms

# No TPU and no GPU here: the one kernel is interpreted, and a stand-in for the other
# looks at what it is handed, which must be one device's part.
dispatch.tpu_unavailable = dispatch.triton_unavailable = lambda: ""
longflow_tpu.longflow_attention_tpu = functools.partial(
    longflow_tpu.longflow_attention_tpu, interpret=True)
SHAPES = []

def stand_in(function):
    def run(*arguments, **options):
        SHAPES.append(arguments[0].shape)
        return function(*arguments, **options)
    return run

longflow.decode_attention_triton = stand_in(decode._xla)
longflow.longflow_attention_triton = stand_in(
    functools.partial(longflow._xla, axis=None))
windows._RUNS["triton"] = stand_in(windows._xla)

ALL = sys.argv[1] == "slow"
mesh = sharding.make_mesh(data=2, model=2)
rng = np.random.default_rng(0)
B, N, K, S, H = 4, 8, 4, 12, 32

def compare(function, letters, arrays, name, collectives):
    alone = jax.jit(function)(*arrays)
    with jax.set_mesh(mesh):
        spread = jax.tree.map(
            lambda axes, x: jax.device_put(
                x, jax.NamedSharding(mesh, partition_spec(axes))), letters, arrays)
        program = jax.jit(function).lower(*spread).compile()
        text = program.as_text()
        got = program(*spread)
    found = re.findall(r"= \S+ (all-\w+|collective-\w+|reduce-scatter)", text)
    assert found == collectives, (name, found)
    for one, two in zip(jax.tree.leaves(alone), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, two, atol=2e-6, err_msg=name)
        if one.dtype == jnp.int32:
            np.testing.assert_array_equal(one, two, err_msg=name)

def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

positions = rng.permuted(np.broadcast_to(np.arange(S), (B, K, S)), axis=-1)
positions[0, :, [1, 5]] = -1
positions, target, position, oldest, newest = (jnp.asarray(x, jnp.int32) for x in (
    positions, rng.integers(0, S, (B, K)), [S, S + 1, -1, S],
    [0, 2, 0, S + 9], [S, S - 1, S, S + 9]))
values = normal(B, K, S, H)
slots = Slots(normal(B, K, S, H), values, positions, target, value_norms(values, "l2"))
arrays = [normal(B, N, H), Token(normal(B, K, H), normal(B, K, H), position), slots,
          oldest, newest]
letters = ["B N H", Token("B K H", "B K H", "B"),
           Slots("B K S H", "B K S H", "B K S", "B K", "B K S"), "B", "B"]
for shared in (True, False) if ALL else (True,):
    for implementation in ("xla", "triton") + ("pallas_tpu", "reference") * ALL:
        compare(
            functools.partial(longflow.longflow_attention, scale=0.3, score="l2",
                              shared=shared, implementation=implementation),
            letters, arrays,
            f"longflow {implementation} {shared}", ["all-gather"] * shared)

arrays = [normal(B, 3, N, H), normal(B, S, K, H), jnp.asarray([0, 9, 4, 2], jnp.int32),
          jnp.asarray([3, 1, 0, 3], jnp.int32)]
for implementation in ("xla", "triton") + ("reference",) * ALL:
    for reduction in ("sum", "max") if ALL else ("sum",):
        def score(query, key, start, count):
            return windows.window_scores(query, key, start, count=count, scale=0.3,
                length=10, reduction=reduction, implementation=implementation)
        compare(score, ["B W N H", "B T K H", "B", "B"], arrays,
                f"window {implementation} {reduction}", [])
assert SHAPES, "no stand-in was called"
for alone, spread in zip(SHAPES[::2], SHAPES[1::2], strict=True):
    assert (spread[0], spread[-2]) == (alone[0] / 2, alone[-2] / 2)
print("equal")
"""


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
    assert over_four_devices(tmp_path, "-c", OPERATIONS, which) == "equal"


@pytest.mark.slow
def test_generation_over_four_devices(tmp_path):
    assert over_four_devices(tmp_path, FOLDER / "sharded_generation.py") == "equal"


def over_four_devices(folder, *arguments):
    """Run Python where JAX finds four devices, and return what it prints."""
    flags = os.environ.get("XLA_FLAGS", "")
    run = subprocess.run(
        [sys.executable, *arguments],
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
