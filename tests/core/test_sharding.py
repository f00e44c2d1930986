"""Rows and heads over several devices: the partition, and that nothing changes."""

import concurrent.futures
import dataclasses
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import hf_checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

import jaxkv
from jaxkv import sharding
from jaxkv import state as kv
from jaxkv.kernels import dispatch, pointwise, project
from jaxkv.kernels.cache import Token
from jaxkv.kernels.per_shard import AXES, COLUMNS, partition_spec, per_shard
from jaxkv.models import layout
from jaxkv.models.config import Experts
from jaxkv.models.decoder import Decoder, parameter_shapes

FOLDER = Path(__file__).parent
CONFIG = dataclasses.replace(
    tiny.CONFIG, vocab_size=64, tied=False, qkv_bias=True, output_bias=True
)


def test_every_parameter_has_a_partition():
    specs = sharding.parameter_specs(parameter_shapes(CONFIG))
    layer = specs["layer_1"]
    everyone = ("model", "copies")
    assert layer["qkv"] == P(None, "model")
    assert layer["gate_up"] == specs["head"] == P(None, everyone)
    assert layer["output"] == layer["down"] == specs["embedding"] == P(everyone, None)
    assert layer["qkv_bias"] == P("model")
    for name in ("attention_norm", "mlp_norm", "q_norm", "k_norm", "output_bias"):
        assert layer[name] == P(None)


def test_experts_are_cut_whole():
    experts = Experts(count=4, per_token=2, size=8, bias=True)
    config = dataclasses.replace(CONFIG, experts=experts)
    layer = sharding.parameter_specs(parameter_shapes(config))["layer_1"]
    assert "gate_up" not in layer and "down" not in layer
    assert layer["experts_gate_up"] == layer["experts_down"] == P(COLUMNS, None, None)
    assert layer["experts_gate_up_bias"] == P(COLUMNS, None)
    assert layer["router"] == P(None, None) and layer["router_bias"] == P(None)


def test_a_parameter_that_declares_no_axes_is_refused():
    params = parameter_shapes(CONFIG)
    params["layer_1"]["adapter"] = params["layer_1"]["down"]
    with pytest.raises(ValueError, match="no mesh axes for the parameter 'adapter'"):
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
    ("changes", "match"),
    [
        ({"num_kv_heads": 3}, "3 key/value heads do .* model=4 .* model=1 or 3"),
        ({"intermediate_size": 49}, "49 feed-forward columns do .* model=1[.]"),
        ({"experts": Experts(count=6, per_token=1, size=2)}, "6 experts do .*=1 or 2"),
        ({"vocab_size": 62}, "62 entries of the vocabulary do .* model=1 or 2"),
        (
            {"num_heads": 5, "num_kv_heads": 1, "head_dim": 2},
            "10 columns of query heads do .* model=1 or 2",
        ),
    ],
)
def test_sizes_must_divide(changes, match):
    config = dataclasses.replace(CONFIG, vocab_size=48, num_heads=12, num_kv_heads=4)
    mesh = AbstractMesh((1, 4, 1), AXES)
    sharding.check(config, mesh)
    with pytest.raises(ValueError, match=match):
        sharding.check(dataclasses.replace(config, **changes), mesh)


def test_columns_of_a_device_lie_together():
    config = dataclasses.replace(  # 4 query heads, 2 key heads, of 2 numbers
        CONFIG, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=4
    )
    q, k, v = np.split(np.arange(16), [8, 12])
    whole = [*q[:4], *k[:2], *v[:2], *q[4:], *k[2:], *v[2:]]
    assert layout.order(config, "qkv", (2, 4)).tolist() == whole
    assert layout.order(config, "qkv_bias", (2, 4)).tolist() == whole
    gates = layout.order(config, "gate_up", (2, 4)).tolist()
    assert gates == [0, 4, 1, 5, 2, 6, 3, 7]
    assert layout.order(config, "down", (2, 4)) is None
    assert layout.order(config, "qkv", (1, 1)) is None


def test_a_layout_of_another_mesh_is_refused():
    params = tiny.parameters(CONFIG)
    network, spread = sharding.spread(Decoder(CONFIG), params, sharding.make_mesh())
    with pytest.raises(ValueError, match=r"laid out for \(2, 2\) devices already"):
        sharding.spread(network.clone(shards=(2, 2)), spread, sharding.make_mesh())
    network, tokens = network.clone(shards=(2, 4)), jnp.zeros((1, 1), jnp.int32)
    with pytest.raises(ValueError, match=r"over 2 and columns over 4 .* has 1"):
        network.apply({"params": params}, tokens, tokens, (), None)


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


def test_rows_that_do_not_divide_are_everywhere():
    Pairs = Float[Array, "B N"]

    def operation(x: Pairs) -> Pairs: ...

    auto = (jax.sharding.AxisType.Auto,) * 3
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 1), AXES, axis_types=auto)):
        for rows, spec in (4, P("data", "model")), (3, P(None, "model")):
            run = per_shard(lambda x: x, operation)
            (equation,) = jax.make_jaxpr(run)(jnp.ones((rows, 4))).eqns
            assert equation.params["in_specs"] == (spec,)
            assert equation.params["out_specs"] == (spec,)


def test_triton_takes_each_devices_part(monkeypatch):
    """The product is chosen by the shape that a device has, not by the whole."""
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    seen = []

    def product(x, weight):
        seen.append((x.shape, weight.shape))
        return (x @ weight)[None]

    monkeypatch.setitem(project._PRODUCTS, "triton", product)
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    auto = (jax.sharding.AxisType.Auto,) * 3
    with jax.sharding.use_abstract_mesh(AbstractMesh((2, 2, 2), AXES, axis_types=auto)):
        for cut, devices in ("heads", 1), ("rows", 4):
            run = functools.partial(project.project, cut=cut)
            out = jax.eval_shape(run, half((128, 1, 256)), half((256, 512)))
            assert out.shape == (devices, 128, 1, 512)
    assert seen == [((64, 1, 256), (256, 256)), ((64, 1, 64), (64, 512))]


def test_tpus_sum_and_so_does_a_row_of_one_device(monkeypatch):
    auto = (jax.sharding.AxisType.Auto,) * 3
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    parts = []
    for backend, sizes in ("cpu", (1, 2, 1)), ("cpu", (2, 1, 1)), ("tpu", (1, 2, 1)):
        monkeypatch.setattr(project.jax, "default_backend", lambda b=backend: b)
        mesh = AbstractMesh(sizes, AXES, axis_types=auto)
        with jax.sharding.use_abstract_mesh(mesh):
            run = functools.partial(project.project, cut="rows", implementation="xla")
            parts.append(len(jax.eval_shape(run, half((2, 1, 64)), half((64, 8)))))
    assert parts == [2, 1, 1]


def test_triton_norms_no_heads_of_several_devices(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    auto = (jax.sharding.AxisType.Auto,) * 3
    with (
        jax.sharding.use_abstract_mesh(AbstractMesh((1, 2, 1), AXES, axis_types=auto)),
        pytest.raises(NotImplementedError, match="no heads of several devices"),
    ):
        pointwise.norm_of_all_heads(
            *(jnp.ones((1, 1, 16)), jnp.ones(8), jnp.ones(4)),
            **dict(num_heads=4, num_kv_heads=2, eps=1e-6, implementation="triton"),
        )


@pytest.mark.parametrize(
    "which", ["fast", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_operations_stay_on_their_devices(tmp_path, which):
    """Equal results, and nothing sent but what a sum or a shared victim needs."""
    assert over_devices(4, tmp_path, "sharded_operations.py", which) == "equal"


@pytest.mark.parametrize(
    "which", ["fast", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_generation_over_eight_devices(tmp_path, which):
    """Tokens of one device, and two sums a layer."""
    assert over_devices(8, tmp_path, "sharded_generation.py", which) == "equal"


@pytest.mark.parametrize(
    "which", ["fast", pytest.param("slow", marks=pytest.mark.slow)]
)
def test_experts_stay_on_their_devices(tmp_path, which):
    """Equal results, and what is sent are sums over the tokens, never weights."""
    assert over_devices(4, tmp_path, "sharded_experts.py", which) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("which", ["fast", "slow"])
def test_an_engine_over_four_devices(tmp_path, which):
    """Tokens of one device, as requests come and go."""
    assert over_devices(4, tmp_path, "sharded_engine.py", which) == "equal"


def test_loading_over_eight_devices(tmp_path):
    """Each reads its own part of each kind of file, and rows need not divide."""
    assert over_devices(8, tmp_path, "sharded_loading.py") == "equal"


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    hf_checkpoints.write_checkpoint(hf_checkpoints.write_config(tmp_path))
    processes = [(), (address, "0"), (address, "1")]
    with concurrent.futures.ThreadPoolExecutor() as all_of_them:
        runs = [
            all_of_them.submit(
                *(over_devices, 4, tmp_path, "sharded_processes.py", str(tmp_path)),
                *process,
            )
            for process in processes
        ]
        alone, *both = [run.result().splitlines()[-1] for run in runs]
    assert both == [alone] * 2


def test_the_command_line_takes_a_mesh(jaxkv_):
    ask = ("generate", "needle", "--prompt", "a b", "--mesh", "model=2")
    code, _, err = jaxkv_(*ask)
    assert code and "model=2 takes 2 devices, but there are 1" in err


@pytest.mark.slow
def test_commands_over_four_devices(tmp_path):
    hf_checkpoints.write_checkpoint(hf_checkpoints.write_config(tmp_path))
    printed = over_devices(4, tmp_path, "sharded_commands.py")
    assert printed.splitlines()[-1] == "equal"


def test_a_cluster_takes_no_mesh(jaxkv_, tmp_path):
    ask = ("batch", tmp_path / "in", tmp_path / "out", "--ray=local", "--mesh=auto")
    code, _, err = jaxkv_(*ask)
    assert code == 2 and "makes one for each GPU; pass one of them" in err


def test_words_that_are_no_mesh():
    with pytest.raises(ValueError, match="expected auto, or numbers of devices"):
        sharding.resolve("model=0", CONFIG)
    with pytest.raises(ValueError, match="takes 64 devices, but there are"):
        sharding.resolve("data=64", CONFIG)
    with pytest.raises(ValueError, match=r"expected a mesh from .*, got 5"):
        sharding.resolve(5, CONFIG)
    with pytest.raises(ValueError, match="expected a mesh from"):
        sharding.resolve(jax.make_mesh((1,), ("x",)), CONFIG)


def test_words_in_any_order_are_one_mesh():
    sizes = {
        tuple(sharding.sizes_of(words, CONFIG, 2).items())
        for words in ("data=2,model=1", "model=1, data=2", "data=2")
    }
    assert sizes == {(("data", 2), ("model", 1))}


def test_what_is_laid_out_is_not_saved(tmp_path):
    lm = tiny.language_model(config=CONFIG, weights={})
    lm = dataclasses.replace(lm, network=lm.network.clone(shards=(2, 2)))
    with pytest.raises(ValueError, match="laid out over a mesh"):
        jaxkv.save(lm, tmp_path / "copy")


def over_devices(count, folder, program, *arguments):
    """Run a program beside this file where JAX finds so many devices: its output.

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
            XLA_FLAGS=f"{flags} --xla_force_host_platform_device_count={count}",
        ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()
