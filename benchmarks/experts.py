"""Time of a layer's experts in each of their ways, against reading them once.

    python benchmarks/experts.py experts.json
    python benchmarks/experts.py small.json --shape small --batches 1,8 --repeats 3

Random weights and random choices in the shape of a public network; the tokens are those
of one decode step, or of a prompt (`--batches 512`). The floor is the time that memory
takes to hand over the experts that were chosen, each once, at `--bandwidth` bytes a
second. A program runs the layer `--layers` times, each with weights of its own, so that
no cache holds them, and every one waits for the one before. The ways take turns; a
number is the median over the turns. With `--pallas-triton`, "ragged" is Pallas' Triton
kernel of `jax.lax.ragged_dot`.
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

from jaxkv.kernels import experts as kernel
from jaxkv.models.config import Experts
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

SMALL = (64, Experts(count=8, per_token=2, size=32))  # for a smoke test on a CPU


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
        best=kernel.choose(tokens, experts.per_token, experts.count),
    )
    for way in ways:
        program = functools.partial(run, gate=experts.gate, implementation=way)
        arguments = (x, chosen, shares, weights)
        jax.block_until_ready(program(*arguments))
        took = seconds(program, arguments, repeats)
        record[way] = dict(ms=1e3 * took / layers, of_floor=took / floor)
        typer.echo(
            f"{tokens} tokens, {way}: {record[way]['ms']:.3f} ms a layer, "
            f"{record[way]['of_floor']:.2f} x the floor"
        )
    return record


def main(
    out: pathlib.Path,
    shape: Annotated[str, typer.Option(help="of SHAPES, or small")] = "qwen3-30b-a3b",
    batches: Annotated[str, typer.Option(help="tokens of a step")] = "1,8,32,64",
    ways: Annotated[str, typer.Option()] = "gather,dense,sorted,blocks",
    layers: Annotated[int, typer.Option(help="so many that no cache holds them")] = 4,
    repeats: Annotated[int, typer.Option()] = 50,
    bandwidth: Annotated[float, typer.Option(help="bytes per second")] = 4.8e12,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    pallas_triton: Annotated[bool, typer.Option()] = False,
):
    """Measure, and write the records."""
    if pallas_triton:
        jax.config.update("jax_ragged_dot_use_gpu_pallas_triton_lowering", True)
    if shape == "small":
        hidden, experts = SMALL
    else:
        hidden, experts = SHAPES[shape].hidden_size, SHAPES[shape].experts
    weights = weights_of(hidden, experts, layers, dtype)
    numbers = [int(number) for number in batches.split(",")]
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
