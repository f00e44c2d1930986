"""Compiling for TPUs without a TPU: the real compilers, for described topologies.

They come with libtpu (`pip install "jaxkv[tpu]"`, 0.5 GB), which CI installs last;
without it all of this is skipped. What the kernels compute is tested elsewhere, in
interpret mode; here only that they compile, in place, in the memory that there is.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="needs libtpu: pip install 'jaxkv[tpu]'")

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_compile.py"
HBM = 16e9  # bytes of a v5e chip


@pytest.fixture(scope="module")
def script():
    """The benchmark's functions; importing it sets what libtpu needs."""
    spec = importlib.util.spec_from_file_location("tpu_compile", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cache_bytes(record, numbers=1):
    """Return what keys, values and so many numbers a slot take beside them."""
    slots = record["B"] * record["K"] * record["S"]
    return slots * (2 * 2 * record["H"] + 4 * numbers)


def all_in_place(record, cache):
    """Return whether what is updated in place is the cache and a tile of targets."""
    return 0 < record["alias_bytes"] - cache <= 4096


@pytest.mark.parametrize("model", [1, 4])
def test_longflow_compiles_in_place_on_every_topology(script, model):
    """On one device, and with its heads and their shared victim spread over four."""
    records = list(script.kernels(["longflow_attention"], model=model))
    assert [r["kind"] for r in records] == list(script.TOPOLOGIES)
    for record in records:
        assert all_in_place(record, cache_bytes(record, 2) / model)  # norms
        assert record["temp_bytes"] < (1e6 if model == 1 else 4e6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["decode_attention", "longflow_tree", "window_scores", "causal_attention"]
)
def test_other_kernels_compile_on_every_topology(script, part):
    for record in script.kernels([part]):
        if part == "decode_attention":
            assert all_in_place(record, cache_bytes(record))
        # Splash may copy queries, keys and values into the order of its axes.
        rows = 2 * record["T"] * (record["N"] + 2 * record["K"]) * record["H"]
        assert record["temp_bytes"] < (2 * rows if part == "causal_attention" else 2e6)


@pytest.mark.slow
def test_all_kernels_compile_with_sinks_and_caps(script):
    parts = [part for part in script.PARTS if part != "generate"]
    only = dict(v5e=script.TOPOLOGIES["v5e"])
    records = list(script.kernels(parts, only, sinks=True, cap=50.0))
    assert len(records) == len(parts)
    for record in records:
        if record["what"] == "longflow_attention":
            assert all_in_place(record, cache_bytes(record, 2))


SETTINGS = {
    "64 bits": lambda: jax.enable_x64(True),
    "highest": lambda: jax.default_matmul_precision("highest"),
}


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_all_kernels_compile_under_other_settings_of_jax(script, setting):
    parts = [part for part in script.PARTS if part != "generate"]
    only = dict(v5e=script.TOPOLOGIES["v5e"])
    with setting():
        records = list(script.kernels(parts, only, nodes=3))
    assert len(records) == len(parts)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["l1", "l2", "attention"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "slots", "head_dim", "dtype"),
    [
        (32, 8, 3201, 64, "bfloat16"),
        (5, 1, 777, 96, "float32"),
        (8, 8, 7, 256, "bfloat16"),
        (32, 8, 131_072, 128, "bfloat16"),
    ],
)
def test_longflow_compiles_at_odd_sizes(
    script, score, heads, kv_heads, slots, head_dim, dtype
):
    from jaxkv.kernels.longflow_tpu import longflow_attention_tpu

    mesh = script.sharding.make_mesh(devices=script.devices("v5e:2x2")[:1])
    sizes = dict(B=3, N=heads, K=kv_heads, S=slots, H=head_dim)
    *inputs, bound = script.decode_inputs(mesh, sizes, jnp.dtype(dtype))
    record = script.compile_one(
        lambda *x: longflow_attention_tpu(*x, scale=0.1, score=score, shared=False),
        (*inputs, bound, bound),
        mesh,
        donate_argnums=2,
    )
    cache = kv_heads * slots * 3 * (2 * head_dim * jnp.dtype(dtype).itemsize + 8)
    assert record["alias_bytes"] >= cache  # odd sizes are padded
    assert record["temp_bytes"] < 2e6


# Qwen3-8B's heads, and smollm2's, with the largest trees that drafters make.
TREES = [
    (32, 8, 16, 128, True),
    (32, 8, 64, 128, True),
    (32, 8, 16, 128, False),
    (9, 3, 16, 64, True),
    (9, 3, 64, 64, False),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v5e", "v6e"])
@pytest.mark.parametrize(("heads", "kv_heads", "nodes", "head_dim", "shared"), TREES)
def test_trees_compile_in_the_memory_that_is_planned(
    script, kind, heads, kv_heads, nodes, head_dim, shared
):
    from jaxkv.kernels.longflow_tree_tpu import longflow_tree_tpu

    mesh = script.sharding.make_mesh(
        devices=script.devices(script.TOPOLOGIES[kind])[:1]
    )
    sizes = dict(B=8, N=heads, K=kv_heads, S=3200, H=head_dim, T=nodes)
    how = dict(n_recent=0, depth=nodes - 1, scale=0.1, shared=shared)
    record = script.compile_one(
        lambda *arrays: longflow_tree_tpu(*arrays, **how),
        script.tree_inputs(mesh, sizes),
        mesh,
    )
    # Queries and outputs may be turned, keys and values not copied.
    assert record["temp_bytes"] < 8 * nodes * 2 * (heads + 2 * kv_heads) * 128 * 2


@pytest.mark.parametrize(
    ("layers", "prompt", "budget"),
    [(1, 1024, 512), pytest.param(36, 4096, 3200, marks=pytest.mark.slow)],
)
def test_generate_fits_a_slice_of_v5e(script, layers, prompt, budget):
    """Qwen3-8B with LongFlow; all 36 layers are many minutes of compiling."""
    record = script.generate(
        layers, prompt=prompt, budget=budget, prefill="snapkv", decode="longflow"
    )
    print(record)
    assert record["layers"] == layers
    assert record["device_bytes"] < HBM
    # Weights in bfloat16 over four devices; what is replicated is small.
    assert record["argument_bytes"] < 2 * 8.2e9 / 4 * 1.02


@pytest.mark.slow
def test_temporaries_of_a_plan(script):
    """Of two layers of Qwen3-8B, less than the formula that `jaxkv plan` else takes."""
    from jaxkv import Options
    from jaxkv.bench import ahead, fit

    config = script.SHAPES["qwen3-8b"]
    mesh = fit.mesh_for(config, "data=2,model=4", 8)
    sizes = dict(batch=8, prompt=1024, new=512, dtype="bfloat16")
    found = ahead.temporaries(config, "v5e:2x4", mesh, Options(), **sizes)
    formula = fit.fit(config, fit.KINDS["v5e"], mesh, Options(), **sizes).temp_bytes
    assert 0.3 * formula < found < formula
