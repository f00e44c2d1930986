"""Time of a layer's experts in each of their ways, against reading them once.

    python benchmarks/experts.py experts.json --ways triton,dense
    python benchmarks/experts.py prompts.json --ways dense,blocks,sorted,ragged \\
        --batches 512,2048 --layers 1 --iterations 2 --repeats 3
    python benchmarks/experts.py small.json --shape small --batches 1,8 --repeats 3
    python benchmarks/experts.py sweep.json --sweep --batches 1,8

Random weights and random choices in the shape of a public network; the tokens are those
of one decode step, or of a prompt (`--batches 512`). The floor is the time that memory
takes to hand over the experts that were chosen, each once, at `--bandwidth` bytes a
second. A step runs the layer `--layers` times, each with weights of its own, so that no
cache holds them, and every one waits for the one before. `--iterations` of these steps
are one compiled loop, as the steps of a generation are, so that the clock sees what a
network would.

A number is the median of `--repeats` calls of the loop, with one layer behind it. On a
GPU the profiler adds how long the kernels themselves took, gaps left out. Some tokens
of that last layer are held against float32. A way that the device has no memory for is
passed over.

With `--sweep`, tiles of Triton's two products take turns until `--seconds` are over.
"""

import functools
import pathlib
import statistics
import time
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv.bench.clock import timed
from jaxkv.bench.kernel_trace import trace_kernels
from jaxkv.kernels import experts as kernel
from jaxkv.kernels.experts_triton import Tiles, experts_triton, tiles_here
from jaxkv.models.config import Experts
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

SMALL = (64, Experts(count=8, per_token=2, size=32))  # for a smoke test on a CPU
CHECKED = 8  # tokens, the last ones
TURNS = 5  # of a sweep's calls
# block, depth, warps, stages: of gate and up, and of down
SWEPT = [
    ((64, 128, 4, 4), (64, 64, 4, 6)),
    ((64, 128, 8, 4), (64, 64, 8, 6)),
    ((64, 64, 8, 4), (64, 128, 8, 4)),
    ((64, 64, 8, 6), (64, 256, 4, 3)),
    ((64, 64, 4, 5), (128, 64, 4, 5)),
]


def weights_of(hidden, experts, layers, dtype):
    """Return the weights of some layers, made on the device."""

    @functools.partial(jax.jit, static_argnums=(1, 2, 3))
    def draw(key, *shape):
        return jax.random.normal(key, shape, dtype) * shape[1] ** -0.5

    count, size = experts.count, experts.size
    keys = jax.random.split(jax.random.key(0), (layers, 2))
    return [
        kernel.Weights(
            draw(first, count, hidden, 2 * size), draw(second, count, size, hidden)
        )
        for first, second in keys
    ]


def inputs(tokens, hidden, experts, layers, dtype):
    """Return tokens, and each layer's random experts of each token, all different.

    Layers have arrays of their own, for XLA copies parts of one to where they begin at
    a multiple of 128 bytes.
    """
    rng = np.random.default_rng(tokens)
    x = jnp.asarray(rng.normal(size=(1, tokens, hidden)), dtype)
    routed = []
    for _ in range(layers):
        logits = jnp.asarray(rng.normal(size=(1, tokens, experts.count)), "float32")
        routed.append(kernel.route(logits, per_token=experts.per_token, normalize=True))
    return x, routed


@functools.partial(jax.jit, static_argnames=("gate", "way", "iterations"))
def run(start, x, routed, weights, *, gate, way, iterations):
    """Run steps one after the other, of which only the tokens change.

    A quarter of what a layer makes of the tokens is added to those of the start, so
    that numbers stay as large as they are. Returns the last tokens, and what the first
    layer makes of them.
    """

    def run(x, choices, weights):
        return kernel.feed_forward(
            *(x, choices[0], choices[1], weights), gate=gate, implementation=way
        )

    def step(_, x):
        for choices, each in zip(routed, weights, strict=True):
            x = start + run(x, choices, each) / 4
        return x

    x = jax.lax.fori_loop(0, iterations, step, x)
    return x, run(x, routed[0], weights[0])


@functools.partial(jax.jit, static_argnames="gate")
def exact(x, choices, weights, *, gate):
    """Return a layer's sums, everything in float32."""
    x = x.astype(jnp.float32)
    return kernel.feed_forward(
        *(x, *choices, weights), gate=gate, implementation="gather"
    )


def measure(tokens, hidden, experts, weights, options):
    """Return the record of one number of tokens."""
    layers, dtype = len(weights), options["dtype"]
    x, routed = inputs(tokens, hidden, experts, layers, dtype)
    used = [len(np.unique(np.asarray(chosen))) for chosen, _ in routed]
    one = 3 * hidden * experts.size * jnp.dtype(dtype).itemsize
    floor = statistics.mean(used) * one / options["bandwidth"]
    record = dict(
        tokens=tokens, experts_used=statistics.mean(used), floor_ms=1e3 * floor
    )
    for way in options["ways"].split(","):
        begin = time.perf_counter()
        try:
            found = time_way(way, experts.gate, x, routed, weights, options)
        except jax.errors.JaxRuntimeError as error:
            record[way] = str(error).partition("\n")[0]
            typer.echo(f"{tokens} tokens, {way}: {record[way]}")
            continue
        record[way] = found | dict(
            of_floor=found["ms"] / record["floor_ms"],
            seconds=time.perf_counter() - begin,
        )
        typer.echo(
            f"{tokens} tokens, {way}: {found['ms']:.4f} ms a layer, "
            f"{record[way]['of_floor']:.2f} x the floor, "
            f"{found['kernels_ms']:.4f} of kernels, "
            f"error {found['error']:.5f}, us {found['us']}"
        )
    return record


def time_way(way, gate, x, routed, weights, options):
    """Return the times of a layer, and the largest error of some tokens."""
    iterations = options["iterations"]
    calls = iterations * len(weights) + 1
    program = functools.partial(run, gate=gate, way=way, iterations=iterations)
    seconds, (last, out) = timed(
        lambda state: program(x, state[0], routed, weights),
        (x, x),
        options["repeats"],
        units=lambda _: calls,
    )
    some = jax.tree.map(lambda leaf: leaf[:, -CHECKED:], (last, routed[0]))
    wanted = np.asarray(exact(*some, weights[0], gate=gate))
    found = np.asarray(out[:, -CHECKED:], np.float32)
    kernels, _ = trace_kernels(lambda: program(x, last, routed, weights), calls)
    return dict(
        ms=1e3 * statistics.median(seconds),
        kernels_ms=sum(one.us for one in kernels.values()) / 1e3,
        us={name: round(one.us, 2) for name, one in list(kernels.items())[:6]},
        error=float(np.abs(found - wanted).max() / np.abs(wanted).max()),
    )


@functools.partial(jax.jit, static_argnames=("gate", "tiles"))
def run_tiles(x, routed, weights, *, gate, tiles):
    """Run the layers one after the other, with tiles of a kind."""
    x = x[0]
    for (chosen, shares), each in zip(routed, weights, strict=True):
        x = experts_triton(x, chosen[0], shares[0], each, gate=gate, tiles=tiles)
    return x


def repeated(call):
    """Make a sweep's calls."""
    return [call() for _ in range(TURNS)]


def sweep(tokens, hidden, experts, weights, dtype, deadline):
    """Return microseconds of each launch, by tiles; those that ship come first."""
    x, routed = inputs(tokens, hidden, experts, len(weights), dtype)
    records = []
    names = "block", "depth", "warps", "stages"
    swept = [
        tuple(Tiles(**dict(zip(names, one, strict=True))) for one in pair)
        for pair in SWEPT
    ]
    for tiles in [tiles_here(hidden, experts.size, experts.per_token), *swept]:
        if time.perf_counter() > deadline:
            break
        call = functools.partial(
            run_tiles, x, routed, weights, gate=experts.gate, tiles=tiles
        )
        jax.block_until_ready(call())
        kernels, _ = trace_kernels(
            functools.partial(repeated, call), TURNS * len(weights)
        )
        us = {name: round(one.us, 2) for name, one in kernels.items()}
        records.append(dict(tokens=tokens, tiles=[str(one) for one in tiles], us=us))
        cuts = ["-".join(str(number) for number in vars(one).values()) for one in tiles]
        typer.echo(f"{tokens} tokens, {' '.join(cuts)}: {us}")
    return records


def main(
    out: pathlib.Path,
    shape: Annotated[str, typer.Option(help="of SHAPES, or small")] = "qwen3-30b-a3b",
    batches: Annotated[str, typer.Option(help="tokens of a step")] = "1,8,32,64",
    ways: Annotated[str, typer.Option()] = "gather,dense,triton",
    layers: Annotated[int, typer.Option(help="so many that no cache holds them")] = 4,
    iterations: Annotated[int, typer.Option(help="of the loop")] = 20,
    repeats: Annotated[int, typer.Option(help="calls of the loop")] = 9,
    bandwidth: Annotated[float, typer.Option(help="bytes per second")] = 4.8e12,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    tiles: Annotated[bool, typer.Option("--sweep")] = False,
    limit: Annotated[float, typer.Option("--seconds", help="of a sweep")] = 30.0,
):
    """Measure, and write the records."""
    if shape == "small":
        hidden, experts = SMALL
    else:
        hidden, experts = SHAPES[shape].hidden_size, SHAPES[shape].experts
    options = dict(
        shape=shape,
        ways=ways,
        layers=layers,
        iterations=iterations,
        repeats=repeats,
        bandwidth=bandwidth,
        dtype=dtype,
    )
    weights = weights_of(hidden, experts, layers, dtype)
    records = []
    deadline = time.perf_counter() + limit
    for tokens in map(int, batches.split(",")):
        if tiles:
            records += sweep(tokens, hidden, experts, weights, dtype, deadline)
        else:
            records.append(measure(tokens, hidden, experts, weights, options))
        write_json(out, provenance() | options | dict(records=records))


if __name__ == "__main__":
    typer.run(main)
