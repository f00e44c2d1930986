"""Check and time the products of a few tokens, on a GPU.

    python benchmarks/project_device.py project.json --seconds 240

The products of Qwen3-1.7B and 8B in bfloat16: as shipped, XLA's, and other tiles until
the time is up. Times are what the profiler saw of the kernels, gaps between launches
left out, and for XLA all kernels that it makes of the product, its sum of parts and its
gates too. Calls take turns in more weights than the second-level cache holds.
"""

import itertools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import typer

from jaxkv.bench.kernel_trace import trace_kernels
from jaxkv.kernels.pointwise import join
from jaxkv.kernels.project import project, project_gated
from jaxkv.kernels.project_triton import (
    Tiles,
    padded,
    project_gated_triton,
    project_triton,
    tiles_here,
)
from jaxkv.kernels.triton_call import num_processors, shared_memory
from jaxkv.provenance import provenance, write_json

# name, depth, columns, gated
PRODUCTS = [
    ("8b qkv", 4096, 6144, False),
    ("8b output", 4096, 4096, False),
    ("8b gate, up", 4096, 12288, True),
    ("8b down", 12288, 4096, False),
    ("1.7b qkv", 2048, 4096, False),
    ("1.7b output", 2048, 2048, False),
    ("1.7b gate, up", 2048, 6144, True),
    ("1.7b down", 6144, 2048, False),
]
ROWS = [1, 8, 32, 64]
SWEPT_ROWS = [8]
CALLS = 12


def make_weights(depth: int, columns: int, gated: bool) -> list[jax.Array]:
    """Return so many matrices that the first is forgotten when the last is read."""
    shape = depth, columns * (1 + gated)
    number = max(2, -(-200_000_000 // (2 * shape[0] * shape[1])))
    keys = jax.random.split(jax.random.key(0), number)
    return [jax.random.normal(key, shape, jnp.bfloat16) / 64 for key in keys]


def time_product(how, x, weights, gated: bool) -> tuple[float, float]:
    """Return microseconds and the largest error, relative to the largest number."""
    multiply: Callable[..., Any]
    if how == "xla":
        multiply = project_gated if gated else project
        options: dict[str, Any] = dict(implementation="xla")
    else:
        multiply = project_gated_triton if gated else project_triton
        options = dict(tiles=how)

    def run(x, weights):
        out = []
        for _, weight in zip(range(CALLS), itertools.cycle(weights), strict=False):
            # After the one before, in this order.
            x, weight = jax.lax.optimization_barrier((x, weight))
            out.append(multiply(x, weight, **options))
            x, out[-1] = jax.lax.optimization_barrier((x, out[-1]))
        return out

    compiled = jax.jit(run).lower(x, weights).compile()
    out = jax.block_until_ready(compiled(x, weights))[0]
    kernels, _ = trace_kernels(lambda: compiled(x, weights), CALLS)
    us = sum(kernel.us for kernel in kernels.values())
    wide = x.astype(jnp.float32), weights[0].astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        want = project_gated(*wide) if gated else project(*wide)[0]
    out = out if gated else join(out, jnp.float32)
    error = jnp.abs(out.astype(jnp.float32) - want).max() / jnp.abs(want).max()
    return us, float(error)


def swept_tiles(rows: int, depth: int, columns: int, gated: bool) -> list[Tiles]:
    """Return tiles that give most processors a program, and no second, short wave."""
    found = []
    for block, tile, warps, stages, parts in itertools.product(
        *([64, 128], [64, 128], [2, 4], [4, 5]), [1] if gated else [2, 4, 8]
    ):
        memory = 2 * stages * tile * (block * (1 + gated) + padded(rows))
        programs = columns // block * parts
        at_once = num_processors() * (shared_memory() // memory)
        if columns % block or depth % (tile * parts) or not at_once:
            continue
        if 96 <= programs <= min(600, at_once) and 40_000 <= memory:
            sizes = dict(parts=parts, block=block, depth=tile)
            found.append(Tiles(**sizes, warps=warps, stages=stages))
    return found


def main(out: pathlib.Path, seconds: float = 240.0) -> None:
    """Time what is shipped and XLA's, then sweep until the time is up."""
    deadline = time.perf_counter() + seconds
    report = provenance() | dict(products=[])

    def measure(name, depth, columns, gated, rows, hows):
        weights = make_weights(depth, columns, gated)
        x = jax.random.normal(jax.random.key(1), (rows, 1, depth), jnp.bfloat16)
        num_bytes = weights[0].nbytes
        for how in hows:
            if time.perf_counter() > deadline:
                return
            us, error = time_product(how, x, weights, gated)
            record = dict(product=name, rows=rows, us=us, error=error)
            record |= dict(how=str(how), tb_per_s=num_bytes / us / 1e6)
            report["products"].append(record)
            print(f"{name} {rows} {how} {us:.2f} us {error:.5f}", flush=True)
            write_json(out, report)

    for (name, depth, columns, gated), rows in itertools.product(PRODUCTS, ROWS):
        shipped = tiles_here(rows, depth, columns, gated=gated)
        measure(name, depth, columns, gated, rows, [shipped, "xla"])
    for (name, depth, columns, gated), rows in itertools.product(PRODUCTS, SWEPT_ROWS):
        tiles = swept_tiles(rows, depth, columns, gated)
        measure(name, depth, columns, gated, rows, tiles)
    # XLA's version rounds gates before they are applied.
    ours = [x["error"] for x in report["products"] if x["how"] != "xla"]
    if max(ours, default=0) > 2**-8:
        raise SystemExit("FAILED")


if __name__ == "__main__":
    typer.run(main)
