"""Rows and heads over several devices: the partition, and that nothing changes."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxkv import sharding
from jaxkv import state as kv
from jaxkv.kernels.longflow_tpu import longflow_attention_tpu
from jaxkv.kernels.per_shard import partition_spec, per_shard
from jaxkv.models.decoder import Config, parameter_shapes

CONFIG = Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qkv_bias=True,
    output_bias=True,
    qk_norm=True,
)

# Run by an interpreter of its own, since the number of devices is fixed at the start.
PROGRAM = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jaxkv import Categorical, Full, Options, StreamingLLM, generation, sharding
from jaxkv import state as kv
from jaxkv.models.decoder import Config, Decoder, random_parameters

config = Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
                num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True)
params = random_parameters(config, jax.random.key(0), jnp.float32)
params = jax.tree.map(lambda x: 12 * x if x.ndim == 2 else x, params)
tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 16)), jnp.int32)
lengths = jnp.asarray([16, 3, 9, 1], jnp.int32)
keys = jax.random.split(jax.random.key(1), 4)

def run(params, implementation):
    policy = StreamingLLM(n_sink=1)
    options = Options(budget=8, prefill=policy, decode=policy, sampler=Categorical(),
                      prefill_implementation=implementation,
                      decode_implementation=implementation)
    return generation.generate_jit(
        Decoder(config), params, tokens, lengths, keys, jnp.asarray([-1]),
        jnp.int32(12), options=options, slots=options.num_slots(16, 12), max_out=12)

for implementation in ("reference", "xla"):
    alone = run(params, implementation)
    mesh = sharding.make_mesh(data=2, model=2)
    sharding.check(config, mesh, batch=4)
    with jax.set_mesh(mesh):
        spread = run(sharding.shard_parameters(params, mesh), implementation)
    np.testing.assert_array_equal(alone.tokens, spread.tokens)
    wanted = sharding.state_specs(spread.cache[0])
    for state in spread.cache:
        assert len(state.keys.sharding.device_set) == 4
        for name in ("keys", "values", "positions", "target"):
            spec = jax.sharding.NamedSharding(mesh, getattr(wanted, name))
            array = getattr(state, name)
            assert array.sharding.is_equivalent_to(spec, array.ndim), name
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
        assert layer[name] == P()


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


def test_without_a_mesh_nothing_is_wrapped():
    assert per_shard(len, ["B"], "B") is len
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        double = per_shard(lambda x, y: (2 * x, y), ["B", "B"], ("B", "B"))
        assert double(jnp.ones(3), jnp.ones(3))[0].tolist() == [2, 2, 2]


def test_a_shared_victim_needs_all_heads_on_one_device():
    def trace(heads, **options):
        arrays = dict(query=(2, 4, 128), key=(2, heads, 128), value=(2, heads, 128))
        arrays |= dict.fromkeys(("keys", "values"), (2, heads, 8, 128))
        arrays |= dict(norms=(2, heads, 8))
        arrays = {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in arrays.items()}
        int32 = dict(positions=(2, heads, 8), target=(2, heads))
        int32 |= dict.fromkeys(("position", "oldest", "newest"), (2,))
        arrays |= {n: jax.ShapeDtypeStruct(s, jnp.int32) for n, s in int32.items()}
        return jax.eval_shape(
            lambda x: longflow_attention_tpu(**x, scale=1.0, interpret=True, **options),
            arrays,
        )

    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((1, 2), ("data", "model"), axis_types=auto)
    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.raises(NotImplementedError, match="all heads of a row on one"):
            trace(2)
        assert trace(2, shared=False).target.shape == (2, 2)


@pytest.mark.slow
def test_generation_over_four_devices(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=dict(
            os.environ,
            JAX_PLATFORMS="cpu",
            XLA_FLAGS="--xla_force_host_platform_device_count=4",
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "equal"
