"""Time of a layer's experts in each of their ways, against reading them once.

    python benchmarks/experts.py experts.json
    python benchmarks/experts.py small.json --shape small --batches 1,8 --repeats 3
    python benchmarks/experts.py sweep.json --sweep --batches 1,8,32 --layers 4

Random weights and random choices in the shape of a public network; the tokens are those
of one decode step, or of a prompt (`--batches 512`). The floor is the time that memory
takes to hand over the experts that were chosen, each once, at `--bandwidth` bytes a
second. A program runs the layer `--layers` times, each with weights of its own, so that
no cache holds them, and every one waits for the one before. The ways take turns; a
number is the median over the turns. On a GPU the profiler adds how long the kernels
themselves took, gaps left out, and every way is held against the float32 reference.

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

from jaxkv.bench.kernel_trace import trace_kernels
from jaxkv.kernels import experts as kernel
from jaxkv.kernels.experts_triton import Tiles, experts_triton, tiles_here
from jaxkv.models.config import Experts
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

SMALL = (64, Experts(count=8, per_token=2, size=32))  # for a smoke test on a CPU
TURNS = 5  # of a sweep's calls
# block, depth, warps, stages: of gate and up, and of down
SWEPT = [
    ((32, 128, 4, 5), (64, 128, 4, 3)),
    ((32, 128, 4, 3), (64, 128, 4, 5)),
    ((32, 128, 2, 4), (64, 128, 2, 4)),
    ((32, 128, 8, 4), (64, 128, 8, 4)),
    ((32, 256, 4, 3), (64, 256, 4, 3)),
    ((32, 64, 4, 6), (64, 64, 4, 6)),
    ((32, 64, 2, 6), (64, 64, 2, 5)),
    ((64, 64, 4, 5), (128, 64, 4, 5)),
    ((64, 64, 8, 5), (128, 64, 8, 5)),
    ((64, 128, 4, 3), (128, 128, 4, 3)),
    ((64, 128, 4, 4), (128, 128, 4, 4)),
    ((64, 128, 8, 4), (128, 128, 8, 4)),
    ((16, 128, 2, 5), (32, 128, 2, 5)),
    ((16, 256, 4, 4), (32, 256, 4, 4)),
]


def weights_of(hidden, experts, layers, dtype):
    """Return the weights of some layers, made on the device."""

    def draw(index, *shape):
        return 0.02 * jax.random.normal(jax.random.key(index), shape, dtype)

    count, size = experts.count, experts.size
    return [
        kernel.Weights(
            draw(2 * layer, count, hidden, 2 * size),
            draw(2 * layer + 1, count, size, hidden),
        )
        for layer in range(layers)
    ]


def choices(rng, tokens, experts, layers):
    """Return each layer's random experts of each token, all different."""
    logits = jnp.asarray(rng.normal(size=(layers, 1, tokens, experts.count)), "float32")
    return kernel.route(logits, per_token=experts.per_token, normalize=True)


@functools.partial(jax.jit, static_argnames=("gate", "implementation"))
def run(x, chosen, shares, weights, *, gate, implementation):
    """Run the layers one after the other."""
    for layer, each in enumerate(weights):
        x = x + kernel.feed_forward(
            *(x, chosen[layer], shares[layer], each),
            gate=gate,
            implementation=implementation,
        )
    return x


def seconds(program, arguments, repeats):
    """Return the median time of a call, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def error(x, chosen, shares, weights, experts, run):
    """Return the largest error of one layer, relative to the largest number."""
    arguments = x, chosen[0], shares[0], weights[0]
    found = np.asarray(run(*arguments, gate=experts.gate)[0], np.float32)
    flat = (leaf[0] for leaf in arguments[:3])
    wanted = np.asarray(kernel._reference(*flat, weights[0], gate=experts.gate))
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def measure(tokens, hidden, experts, weights, ways, repeats, bandwidth, dtype):
    """Return the record of one number of tokens."""
    rng = np.random.default_rng(tokens)
    layers = len(weights)
    chosen, shares = choices(rng, tokens, experts, layers)
    x = jnp.asarray(rng.normal(size=(1, tokens, hidden)), dtype)
    used = [len(np.unique(np.asarray(layer))) for layer in chosen]
    one = 3 * hidden * experts.size * jnp.dtype(dtype).itemsize
    floor = sum(used) * one / bandwidth
    record = dict(
        tokens=tokens,
        experts_used=statistics.mean(used),
        floor_ms=1e3 * floor / layers,
    )
    for way in ways:
        program = functools.partial(run, gate=experts.gate, implementation=way)
        arguments = (x, chosen, shares, weights)
        jax.block_until_ready(program(*arguments))
        took = seconds(program, arguments, repeats)
        kernels, _ = trace_kernels(functools.partial(program, *arguments), layers)
        single = functools.partial(kernel.feed_forward, implementation=way)
        record[way] = dict(
            ms=1e3 * took / layers,
            of_floor=took / floor,
            error=error(*arguments, experts, single),
            us={name: round(one.us, 2) for name, one in list(kernels.items())[:4]},
        )
        typer.echo(
            f"{tokens} tokens, {way}: {record[way]['ms']:.4f} ms a layer, "
            f"{record[way]['of_floor']:.2f} x the floor, "
            f"error {record[way]['error']:.5f}, us of kernels {record[way]['us']}"
        )
    return record


@functools.partial(jax.jit, static_argnames=("gate", "tiles"))
def run_tiles(x, chosen, shares, weights, *, gate, tiles):
    """Run the layers one after the other, with tiles of a kind."""
    x = x[0]
    for layer, each in enumerate(weights):
        arguments = x, chosen[layer, 0], shares[layer, 0], each
        x = x + experts_triton(*arguments, gate=gate, tiles=tiles)
    return x


def sweep(tokens, hidden, experts, weights, dtype, deadline):
    """Return microseconds of each launch, by tiles; those that ship come first."""
    rng = np.random.default_rng(tokens)
    chosen, shares = choices(rng, tokens, experts, len(weights))
    x = jnp.asarray(rng.normal(size=(1, tokens, hidden)), dtype)
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
            *(run_tiles, x, chosen, shares, weights), gate=experts.gate, tiles=tiles
        )
        jax.block_until_ready(call())
        kernels, _ = trace_kernels(
            lambda call=call: [call() for _ in range(TURNS)], TURNS * len(weights)
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
    layers: Annotated[int, typer.Option(help="so many that no cache holds them")] = 16,
    repeats: Annotated[int, typer.Option()] = 50,
    bandwidth: Annotated[float, typer.Option(help="bytes per second")] = 4.8e12,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    tiles: Annotated[bool, typer.Option("--sweep")] = False,
    limit: Annotated[float, typer.Option("--seconds", help="of a sweep")] = 50.0,
):
    """Measure, and write the records."""
    if shape == "small":
        hidden, experts = SMALL
    else:
        hidden, experts = SHAPES[shape].hidden_size, SHAPES[shape].experts
    weights = weights_of(hidden, experts, layers, dtype)
    numbers = [int(number) for number in batches.split(",")]
    if tiles:
        deadline = time.perf_counter() + limit
        records = [
            record
            for tokens in numbers
            for record in sweep(tokens, hidden, experts, weights, dtype, deadline)
        ]
    else:
        records = [
            measure(
                *(tokens, hidden, experts, weights, ways.split(",")),
                *(repeats, bandwidth, dtype),
            )
            for tokens in numbers
        ]
    options = dict(shape=shape, layers=layers, bandwidth=bandwidth, dtype=dtype)
    write_json(out, provenance() | options | dict(records=records))


if __name__ == "__main__":
    typer.run(main)
