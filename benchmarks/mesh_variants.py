"""Which way of adding up over devices is fast, alone and in whole decode steps.

    python benchmarks/mesh_variants.py sums --out sums.json     # a sum alone, in a loop
    python benchmarks/mesh_variants.py steps --out steps.json   # steps of Qwen3-8B

A step's sums are made in several ways, all within one run, so that they are comparable:

* `chosen`: as jaxkv does, by `per_shard.parts_of_row` and `runtime.collectives`;
* `looped`: the same, in a CUDA graph that holds the loop over steps, too;
* `default`: as XLA likes it. From JAX 0.11 on that is a kernel of its own on a stream
  beside, which no CUDA graph holds: 73 of them cut a step of 36 layers into pieces;
* `unrecorded`: the same, and no CUDA graph at all, which says what graphs are worth;
* `nccl`: NCCL's sum, between graphs;
* `recorded`: NCCL's sum, in one CUDA graph with all the rest of the step;
* `gather`: each device hears the parts of all others, by NCCL, between graphs;
* `gathered`: likewise in one graph. Whoever reads them adds them, in their order;
* `narrow`: likewise, of products that need no adding up on the device before, by twice
  as many programs of half as many columns.

On one device all ways of a step are alike but `looped`.

`sums` gives each environment of NCCL (`ENVIRONMENTS`) a process of its own, after one
with all ways; a process that fails or hangs is a row with an error. `--symmetric` adds
NCCL's symmetric buffers, which are not tried unless asked for. `steps --profile` adds
what kernels of a step take by name and grid, and how long none runs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import typer
from mesh import SMALL, Report, methods, weights

from jaxkv import generation, sharding
from jaxkv.bench import clock, decode_step
from jaxkv.bench.kernel_trace import trace_timeline
from jaxkv.kernels import per_shard, project
from jaxkv.kernels.per_shard import COLUMNS
from jaxkv.kernels.project_triton import Tiles, unembed_triton
from jaxkv.models.public_shapes import SHAPES
from jaxkv.runtime import collectives, programs

app = typer.Typer(help=__doc__)

KERNELS, GRAPHS = (
    "xla_gpu_experimental_use_collective_kernels",
    "xla_gpu_enable_command_buffer",
)
ALL = dict(collectives._TOLD)[GRAPHS]
BY_XLA = "COLLECTIVE_KERNEL_ALL_REDUCE,COLLECTIVE_KERNEL_ALL_GATHER"
NCCL = {KERNELS: ""}
RECORDED = NCCL | {GRAPHS: ALL}
LOOPED = NCCL | {GRAPHS: ALL + ",WHILE", "xla_gpu_graph_min_graph_size": "1"}
SYMMETRIC = "xla_gpu_experimental_enable_nccl_symmetric_buffers"

# Name: how parts meet, and what XLA is told.
WAYS: dict[str, tuple[str, dict[str, str]]] = {
    "chosen": ("chosen", {}),
    "looped": ("chosen", LOOPED),
    "default": ("psum", {}),
    "unrecorded": ("psum", {GRAPHS: ""}),
    "nccl": ("psum", NCCL),
    "gather": ("gather", NCCL),
    "recorded": ("psum", RECORDED),
    "gathered": ("gather", RECORDED),
    "narrow": ("narrow", RECORDED),
}
STEPS_ONLY = ("chosen", "looped", "narrow")
ALONE = {way: how for way, how in WAYS.items() if way not in STEPS_ONLY} | {
    "gathered by XLA": ("gather", {KERNELS: BY_XLA}),
    "passed on": ("pass", RECORDED),
    "nothing": ("nothing", RECORDED),
}
ENVIRONMENTS = (
    {"NCCL_PROTO": "LL"},
    {"NCCL_PROTO": "LL128"},
    {"NCCL_PROTO": "Simple"},
    {"NCCL_PROTO": "LL", "NCCL_MAX_NCHANNELS": "2"},
    {"NCCL_PROTO": "LL", "NCCL_MIN_NCHANNELS": "16"},
)
NARROW = Tiles(parts=1, block=32, depth=256, warps=4, stages=4)
AT_ONCE, LOOPS = 16, 50  # sums of a turn, turns

Out = Annotated[Path, typer.Option(help="File for the result.")]
Text = Annotated[str, typer.Option()]
Number = Annotated[int, typer.Option()]
Model = Annotated[int, typer.Option(help="Devices of a row.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="A smoke test of the script.")]


def meet(how: str, x: jax.Array, count: int) -> jax.Array:
    """Return the sum over the devices of a row, times something, by one way."""
    if how == "gather":
        parts = jax.lax.all_gather(x, COLUMNS)
        return sum(part.astype(jnp.float32) for part in parts).astype(x.dtype)
    if how == "pass":
        total, part = x, x
        turn = [(i, (i + 1) % count) for i in range(count)]
        for _ in range(count - 1):
            part = jax.lax.ppermute(part, COLUMNS, turn)
            total += part
        return total
    return count * x if how == "nothing" else jax.lax.psum(x, COLUMNS)


def sum_row(
    mesh: Any, way: str, rows: int, dtype: str, turns: int, more: dict[str, Any]
) -> dict[str, Any]:
    """Return microseconds of a sum, each waiting for the one before, and its error."""
    how, told = ALONE[way]
    count = sharding.devices_of_a_row(mesh)
    spec = jax.sharding.PartitionSpec(COLUMNS)

    def turn(_, x):
        for _ in range(AT_ONCE):
            x = (meet(how, x, count) / count).astype(x.dtype)
            x = jax.lax.optimization_barrier(x)  # each is a launch, as in a layer
        return x

    def loop(x):
        def run(x):
            return jax.lax.fori_loop(0, turns, turn, x)

        return jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=False)(x)

    start = np.random.default_rng(0).standard_normal((count, rows, 4096))
    with jax.set_mesh(mesh):
        x = jax.device_put(
            jnp.asarray(start, dtype), jax.sharding.NamedSharding(mesh, spec)
        )
        lowered = jax.jit(loop, donate_argnums=0).lower(x)
        program = lowered.compile(compiler_options=told | more)
        seconds, x = clock.timed(program, x, 5, units=lambda _: turns * AT_ONCE)
    wanted = start if way == "nothing" else start.mean(0, keepdims=True)
    off = np.abs(np.asarray(x, np.float32) - wanted).max()
    if off > 0.05:
        raise RuntimeError(f"sums: expected the mean of all devices, {off} off.")
    us = [1e6 * second for second in seconds]
    return dict(us=statistics.median(us), calls_us=us, off=float(off))


@app.command(hidden=True)
def worker(
    out: Out,
    ways: Text,
    sizes: Text,
    dtypes: Text,
    told: Text,
    model: Number,
    turns: Number,
) -> None:
    """Measure sums in this process's environment."""
    mesh = sharding.make_mesh(model=model, devices=jax.devices()[:model])
    report = Report(out, benchmark="mesh sums")
    for dtype in dtypes.split(","):
        for rows in map(int, sizes.split(",")):
            for way in ways.split(","):
                how: dict[str, Any] = dict(way=way, rows=rows, dtype=dtype)
                more = json.loads(told)
                report.add(
                    functools.partial(sum_row, mesh, turns=turns, more=more, **how),
                    **how,
                )


def in_a_process(seconds: float, environment: dict[str, str], **given: Any) -> dict:
    """Return the result of `worker` in an environment; with `error` where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "rows.json"), Path(folder, "log")
        options = [f"--{name}={value}" for name, value in given.items()]
        command = [sys.executable, __file__, "worker", f"--out={out}", *options]
        begin, wrong = time.perf_counter(), ""
        with log.open("w", encoding="utf-8") as stream:
            try:
                done = subprocess.run(
                    command,
                    stdout=stream,
                    stderr=stream,
                    env=os.environ | environment,
                    timeout=seconds,
                    check=False,
                )
                wrong = f"ended with {done.returncode}" if done.returncode else ""
            except subprocess.TimeoutExpired:
                wrong = f"did not end in {seconds} s"
        result = json.loads(out.read_text()) if out.exists() else {"rows": []}
        if wrong:
            tail = log.read_text(encoding="utf-8", errors="replace")[-600:]
            result["rows"].append({"error": f"{wrong}: {tail}"})
        result["seconds"] = round(time.perf_counter() - begin, 1)
        return result | {"environment": environment, "told": given["told"]}


@app.command()
def sums(
    out: Out,
    model: Model = 2,
    seconds: Annotated[float, typer.Option(help="For the first; others have 12.")] = 60,
    dtypes: Text = "bfloat16",
    symmetric: Annotated[bool, typer.Option("--symmetric")] = False,
    tiny: Tiny = False,
) -> None:
    """Time one sum in every way, and in every environment of NCCL."""
    first = dict(ways=",".join(ALONE), sizes="8,64,1", dtypes=dtypes)
    others = dict(ways="recorded,gathered", sizes="8,64", dtypes="bfloat16")
    common: dict[str, Any] = dict(model=model, turns=LOOPS, told="{}")
    if tiny:
        first |= dict(sizes="1", dtypes="float32")
        others |= dict(sizes="1", ways="default")
        common |= dict(turns=1)
        seconds = 600
    runs = [in_a_process(seconds, {}, **first, **common)]
    show(runs[-1])
    told = json.dumps({SYMMETRIC: True})
    plans: list[tuple[dict, dict]] = [
        (environment, {}) for environment in ENVIRONMENTS[: 1 if tiny else None]
    ]
    plans += [({}, dict(told=told))] if symmetric else []
    for environment, other in plans:
        limit = seconds if tiny else 12.0
        runs.append(in_a_process(limit, environment, **others, **common | other))
        show(runs[-1])
        out.write_text(json.dumps(runs, indent=1), encoding="utf-8")


def show(run: dict[str, Any]) -> None:
    """Print a table: a row for each way, a column for each size."""
    print(run["environment"], run["told"], run["seconds"], "s", flush=True)
    for row in run["rows"]:
        named = " ".join(str(row.get(key, "")) for key in ("way", "rows", "dtype"))
        print(
            f"  {named:32}", row["error"] if "error" in row else f"{row['us']:.2f} us"
        )


@contextlib.contextmanager
def parts_meet(how: str) -> Iterator[None]:
    """Let the products that are cut along rows meet in one way while one is traced."""

    def narrow(run, devices):
        def whole(x, weight):
            if jax.default_backend() == "gpu":
                part = unembed_triton(x, weight, tied=False, tiles=NARROW)
            else:
                part = project.join(run(x, weight), x.dtype)
            return per_shard.parts_of_row(part, devices)

        return whole

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        if how != "chosen":
            # What XLA is told, the way says.
            patch(mock.patch.object(programs, "compiler_options", lambda mesh: ()))
            most = -1 if how == "psum" else sys.maxsize
            patch(mock.patch.object(per_shard, "MOST_HEARD", most))
        if how == "narrow":
            patch(mock.patch.object(project, "_of_all_devices", narrow))
        yield


def compiled(
    work: dict[str, Any], state: Any, ways: list[str], options: Any
) -> dict[str, Callable[[], Any]]:
    """Return programs of a step's loop by way; XLA compiles them side by side."""
    lowered = {}
    for how in dict.fromkeys(WAYS[way][0] for way in ways):
        with parts_meet(how):
            lowered[how] = generation.advance_jit.lower(
                *(work["network"], work["params"], state),
                *decode_step.loop_ends(state),
                options=options,
            )

    def build(way):
        how, told = WAYS[way]
        if work["alone"] and way != "looped":
            told = {}
        seen = {"xla_enable_command_buffers_during_profiling": True}
        return lowered[how].compile(compiler_options=told | seen)

    pool = concurrent.futures.ThreadPoolExecutor(len(ways))
    return {way: pool.submit(build, way).result for way in ways}


def step_rows(
    report: Report, work: dict[str, Any], ways: list[str], profiled: list[str], **named
) -> None:
    """Measure one batch and method in all ways."""
    options, steps, repeats = work["options"], work["steps"], work["repeats"]
    where = dict(steps=steps, context=work["slots"], policy=options.decode)
    cache = decode_step.full_cache(
        work["network"].config,
        batch=named["batch"],
        slots=options.num_slots(work["slots"] - steps, steps),
        dtype=work["params"]["embedding"].dtype,
        key=jax.random.key(1),
        mesh=decode_step.mesh_of(work["params"]),
    )
    held = [cache]
    first = decode_step.rewind(cache, **where)
    programs = compiled(work, first, ways, options)
    held[0] = first.cache

    def measure(way):
        program, params = programs[way](), work["params"]
        calls, held[0] = decode_step.time_calls(
            program, params, held[0], repeats=repeats, **where
        )
        row: dict[str, Any] = dict(step_ms=statistics.median(calls), calls_ms=calls)
        if way in profiled:
            state = jax.block_until_ready(decode_step.rewind(held[0], **where))
            ends = jax.block_until_ready(decode_step.loop_ends(state))
            line, state = trace_timeline(lambda: program(params, state, *ends), steps)
            held[0] = state.cache
            row |= dataclasses.asdict(line)
            show_kernels(line)
        return row

    for way in ways:
        measured = functools.partial(measure, way)
        report.add(measured, way=way, what="step", data=1, **named)


def show_kernels(line: Any, most: int = 24) -> None:
    """Print the longest kernels of a step of the first device."""
    print(f"  a step: {line.span_us:.0f} us, of them {line.idle_us:.0f} without kernel")
    for name, kernel in list(line.kernels.items())[:most]:
        each = kernel.us / kernel.launches
        print(
            f"  {kernel.us:8.1f} us {kernel.launches:6.1f} x {each:6.2f}  {name[:90]}"
        )


@app.command()
def steps(
    out: Out,
    shape: str = "qwen3-8b",
    cases: Annotated[
        str, typer.Option(help="Batch:method:ways joined by +; with commas.")
    ] = (
        "8:full:chosen+looped+narrow,64:full:chosen+looped,"
        "8:longflow:chosen+looped,64:longflow:chosen+looped"
    ),
    alone: Annotated[
        str, typer.Option(help="Cases of one device.")
    ] = "8:full:default+looped,64:full,8:longflow:default+looped,64:longflow",
    profile: Annotated[str, typer.Option(help="Ways, with commas.")] = "",
    model: Model = 2,
    slots: int = 3200,
    steps: int = 32,
    repeats: int = 3,
    dtype: str = "bfloat16",
    tiny: Tiny = False,
) -> None:
    """Time whole decode steps in every way, beside one device's."""
    config = SHAPES[shape]
    if tiny:
        config, slots, steps, dtype = SMALL, 32, 4, "float32"
    report = Report(out, benchmark="mesh steps", shape=shape, slots=slots, steps=steps)
    for count, wanted in ((1, alone), (model, cases)):
        network, params = weights(config, model=count, dtype=dtype)
        for case in filter(None, wanted.split(",")):
            batch, method, *ways = case.split(":")
            work = dict(network=network, params=params, options=methods(slots)[method])
            work |= dict(steps=steps, repeats=repeats, slots=slots, alone=count == 1)
            ways = ways[0].split("+") if ways else ["default"]
            named = dict(batch=int(batch), method=method, model=count)
            step_rows(report, work, ways, profile.split(","), **named)
            del work
            gc.collect()
        del network, params
        gc.collect()


if __name__ == "__main__":
    app()
