"""Compile for TPUs without a TPU, and write down compile times and memory.

    pip install "jaxkv[tpu]"    # libtpu, 0.5 GB, has the compiler
    python benchmarks/tpu_compile.py --out tpu.json
    python benchmarks/tpu_compile.py --part generate --prompt 4096 --prefill snapkv \
        --decode longflow --budget 3200 --out longflow.json

JAX itself runs on the CPU; the real XLA:TPU and Mosaic compilers work for a described
topology. Nothing is run, so there is nothing here about speed. The parts are the
kernels (decode_attention, longflow_attention, longflow_tree, window_scores and
causal_attention, which is JAX's "splash"), for one device each of v5e, v6e, v5p and
tpu7x, at the attention shape of Qwen3-8B; and generate: prefill and the decode loop of
Qwen3-8B as one program for a v5e slice of 8 chips, rows over 2 and heads over 4, with
the policies that the flags name.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # it only compiles

import jax
import jax.numpy as jnp
import typer
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv import Options, generation, registry, sharding
from jaxkv.kernels.cache import Nodes, Slots, Token
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.longflow import longflow_attention
from jaxkv.kernels.longflow_tree import longflow_tree
from jaxkv.kernels.per_shard import partition_spec
from jaxkv.kernels.prefill import causal_attention
from jaxkv.kernels.window_scores import window_scores
from jaxkv.models.decoder import Decoder, parameter_shapes
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

TOPOLOGIES = {
    "v5e": "v5e:2x2",
    "v6e": "v6e:2x2",
    "v5p": "v5p:2x2x1",
    "tpu7x": "tpu7x:2x2x1",
}
PARTS = (
    "decode_attention",
    "longflow_attention",
    "longflow_tree",
    "window_scores",
    "causal_attention",
    "generate",
)
HEADS, KV_HEADS, HEAD_DIM, SCALE = 32, 8, 128, 128**-0.5


def devices(topology: str) -> list[Any]:
    """Return the devices of a topology that is only described."""
    return get_topology_desc(platform="tpu", topology_name=topology).devices


def abstract(mesh: Mesh, letters: str, sizes: dict[str, int], dtype=jnp.bfloat16):
    """Return an array by its axis letters, cut over the mesh; nothing is allocated."""
    return jax.ShapeDtypeStruct(
        tuple(sizes[letter] for letter in letters.split()),
        dtype,
        sharding=NamedSharding(mesh, partition_spec(letters)),
    )


def decode_inputs(mesh: Mesh, sizes: dict[str, int], dtype=jnp.bfloat16):
    """Return query, token and slots of a decode step, and a bound of what may go."""
    array = functools.partial(abstract, mesh, sizes=sizes, dtype=dtype)
    integers = functools.partial(array, dtype=jnp.int32)
    token = Token(array("B K H"), array("B K H"), integers("B"))
    norms = array("B K S", dtype=jnp.float32)
    held = array("B K S H"), array("B K S H"), integers("B K S"), integers("B K")
    return array("B N H"), token, Slots(*held, norms), integers("B")


def tree_inputs(mesh: Mesh, sizes: dict[str, int], dtype=jnp.bfloat16):
    """Return query, nodes and slots, a bound of what may go, parents and depths."""
    array = functools.partial(abstract, mesh, sizes=sizes, dtype=dtype)
    tree = [abstract(mesh, "B T", sizes, jnp.int32)] * 2
    _, _, slots, bound = decode_inputs(mesh, sizes, dtype)
    nodes = Nodes(array("B T K H"), array("B T K H"), bound)
    return array("B T N H"), nodes, slots, bound, *tree


def compile_one(function, arguments, mesh: Mesh, **jit) -> dict[str, Any]:
    """Compile and return seconds and bytes per device."""
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        lowered = jax.jit(function, **jit).lower(*arguments)
        middle = time.perf_counter()
        compiled = lowered.compile()
        end = time.perf_counter()
    memory = compiled.memory_analysis()
    record = dict(trace_seconds=middle - begin, compile_seconds=end - middle)
    for name in ("argument", "output", "alias", "temp"):
        record[f"{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes")
    record["device_bytes"] = (
        record["argument_bytes"]
        + record["output_bytes"]
        - record["alias_bytes"]
        + record["temp_bytes"]
    )
    return record


def kernels(
    parts: Sequence[str],
    topologies: Mapping[str, str] = TOPOLOGIES,
    batch: int = 8,
    slots: int = 3200,
    length: int = 8192,
    window: int = 32,
    nodes: int = 16,
    model: int = 1,
    cap: float | None = None,
    sinks: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yield a record for each kernel among `parts` and each topology.

    The heads are spread over `model` devices; the bytes are those of one. Logits may
    have a bound, and heads a sink.
    """
    sizes = dict(B=batch, N=HEADS, K=KV_HEADS, H=HEAD_DIM, S=slots, W=window)
    for name, topology in topologies.items():
        mesh = sharding.make_mesh(model=model, devices=devices(topology)[:model])
        query, token, cache, bound = decode_inputs(mesh, sizes)
        prompt = dict(sizes, T=length, B=1)
        rows = [abstract(mesh, f"B T {heads} H", prompt) for heads in ("N", "K", "K")]
        queries = abstract(mesh, "B W N H", prompt)
        start = count = abstract(mesh, "B", prompt, jnp.int32)
        run = functools.partial
        sink = [abstract(mesh, "N", sizes)] if sinks else []
        in_place = dict(donate_argnums=2)
        for what, function, arguments, options in (
            (
                "decode_attention",
                run(decode_attention, scale=SCALE, implementation="pallas_tpu"),
                [query, token, cache._replace(norms=None), *sink],
                in_place,
            ),
            (
                "longflow_attention",
                run(longflow_attention, scale=SCALE, implementation="pallas_tpu"),
                [query, token, cache, bound, bound, *sink],
                in_place,
            ),
            (
                "longflow_tree",
                run(
                    longflow_tree,
                    **dict(n_recent=0, depth=nodes - 1, scale=SCALE),
                    implementation="pallas_tpu",
                ),
                [*tree_inputs(mesh, sizes | dict(T=nodes)), *sink],
                {},
            ),
            (
                "window_scores",
                run(
                    window_scores,
                    scale=SCALE,
                    length=length - window,
                    implementation="pallas_tpu",
                ),
                [queries, rows[1], start, count, *sink],
                {},
            ),
            (
                "causal_attention",
                run(causal_attention, scale=SCALE, implementation="splash"),
                [*rows, *sink],
                {},
            ),
        ):
            if what not in parts:
                continue
            function = run(function, cap=cap)
            record = dict(what=what, topology=topology, kind=name, **sizes, T=length)
            yield record | compile_one(function, arguments, mesh, **options)


def generate(
    layers: int | None,
    topology: str = "v5e:2x4",
    data: int = 2,
    model: int = 4,
    batch: int = 16,
    prompt: int = 2048,
    budget: int = 3200,
    new: int = 8192,
    prefill: str = "streaming-llm",
    decode: str = "streaming-llm",
) -> dict[str, Any]:
    """Return the record of the whole program: prefill, then the loop of decode steps.

    The cache holds `budget` tokens however long the output is. The policies are written
    as on the command line; see `methods.parse`.
    """
    config = SHAPES["qwen3-8b"]
    if layers is not None:
        config = dataclasses.replace(config, num_layers=layers)
    mesh = sharding.make_mesh(data=data, model=model, devices=devices(topology))
    mesh = sharding.for_network(mesh, config)
    shapes = parameter_shapes(config)
    params = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=where),
        shapes,
        sharding.parameter_shardings(shapes, mesh),
    )
    options = Options(
        budget=budget,
        prefill=registry.parse(prefill, registry.PREFILL, flag="--prefill"),
        decode=registry.parse(decode, registry.DECODE, flag="--decode"),
        prefill_implementation="splash",
        decode_implementation="pallas_tpu",
        scores_implementation="pallas_tpu",
    )
    options.check()
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    everywhere = NamedSharding(mesh, PartitionSpec())
    sizes = dict(B=batch, P=prompt, L=2)
    array = functools.partial(abstract, mesh, sizes=sizes, dtype=jnp.int32)
    arguments = (
        params,
        array("B P"),
        array("B"),
        jax.ShapeDtypeStruct(
            keys.shape, keys.dtype, sharding=NamedSharding(mesh, partition_spec("B"))
        ),
        array("L"),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
    )
    program = functools.partial(
        generation.generate_tokens,
        Decoder(config, shards=sharding.shards_of(mesh)),
        options=options,
        slots=options.num_slots(prompt, new),
        max_out=new,
    )
    record = dict(
        what="generate",
        model="qwen3-8b",
        layers=config.num_layers,
        topology=topology,
        mesh=dict(mesh.shape),
        batch=batch,
        prompt=prompt,
        budget=budget,
        max_out=new,
        prefill=repr(options.prefill),
        decode=repr(options.decode),
        prefill_implementation=options.prefill_implementation,
        decode_implementation=options.decode_implementation,
    )
    return record | compile_one(program, arguments, mesh)


def main(
    out: Annotated[pathlib.Path, typer.Option()],
    part: Annotated[list[str], typer.Option()] = list(PARTS),  # noqa: B006
    layers: int | None = None,
    prompt: int = 2048,
    budget: int = 3200,
    prefill: str = "streaming-llm",
    decode: str = "streaming-llm",
) -> None:
    """Compile the chosen parts and write the records."""
    report = provenance() | dict(
        note="compiled ahead of time for the topology of each record; nothing was run",
        records=[],
    )
    records = itertools.chain(
        kernels(part),
        (
            generate(
                layers, prompt=prompt, budget=budget, prefill=prefill, decode=decode
            )
            for name in part
            if name == "generate"
        ),
    )
    for record in records:
        report["records"].append(record)
        print(
            f"{record['what']:20} {record['topology']:12} "
            f"trace {record['trace_seconds']:.1f} s, "
            f"compile {record['compile_seconds']:.1f} s, "
            f"temporaries {record['temp_bytes'] / 1e6:.1f} MB, "
            f"device {record['device_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        write_json(out, report)


if __name__ == "__main__":
    typer.run(main)
