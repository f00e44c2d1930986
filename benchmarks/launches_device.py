"""Check and time decode steps with and without what saves launches, on a GPU.

    python benchmarks/launches_device.py launches.json

Whole steps of LongFlow at 3,200 slots, random bfloat16 weights, in one process, so that
old and new are timed on one warm machine: `0` fetches nothing ahead, `8` up to 8 MiB
(`kernels/ahead_triton.py`). All ways must give the same tokens.
"""

import gc
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import typer

from jaxkv.bench import clock, decode_step
from jaxkv.kernels import ahead_triton
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import Options
from jaxkv.policies.longflow import LongFlow
from jaxkv.provenance import provenance, write_json

SMOLLM2 = Config(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    tied=True,
)
BUDGET = 3200


def time_way(network, params, cache, options, steps, repeats) -> tuple[Any, ...]:
    """Return tokens, milliseconds a step of each call, and the cache."""
    jax.clear_caches()
    where: dict[str, Any] = dict(steps=steps, context=BUDGET, policy=options.decode)
    state = decode_step.rewind(cache, **where)
    program, _ = decode_step.compile_steps(network, params, state, options=options)
    state = jax.block_until_ready(program(params, state, *decode_step.loop_ends(state)))
    tokens = jax.device_get(state.tokens)
    calls, cache = decode_step.time_calls(
        program, params, state.cache, repeats=repeats, **where
    )
    return tokens, calls, cache


def main(
    out: pathlib.Path,
    shapes: str = "smollm2-135m,qwen3-1.7b,qwen3-8b",
    batch: str = "1,8,32",
    ahead: str = "0,8",
    steps: int = 64,
    repeats: int = 5,
) -> None:
    """Time steps, in milliseconds, per shape, batch and way."""
    bandwidth = clock.copy_bandwidth(1 << 30)
    report: dict[str, Any] = provenance() | dict(copy=bandwidth, rows=[])
    options, failed = Options(budget=BUDGET, decode=LongFlow()), False
    for shape in shapes.split(","):
        config = SMOLLM2 if shape == "smollm2-135m" else SHAPES[shape]
        network = Decoder(config)
        params = random_parameters(config, jax.random.key(0), jnp.bfloat16)
        for rows in map(int, batch.split(",")):
            cache = decode_step.full_cache(
                config,
                batch=rows,
                slots=BUDGET,
                dtype=jnp.bfloat16,
                key=jax.random.key(1),
            )
            size = decode_step.weight_bytes(params, config)
            size += decode_step.key_value_bytes(cache)
            floor = decode_step.floor_ms(size, bandwidth)
            first = None
            for way in ahead.split(","):
                ahead_triton.MOST_BYTES = int(way) << 20
                tokens, calls, cache = time_way(
                    network, params, cache, options, steps, repeats
                )
                first = tokens if first is None else first
                same = bool((tokens == first).all())
                failed |= not same
                ms = statistics.median(calls)
                row = dict(shape=shape, batch=rows, ahead=way, ms=ms, same=same)
                row |= dict(calls_ms=calls, times_floor=ms / floor)
                report["rows"].append(row)
                write_json(out, report)
                print(
                    f"{shape} {rows}: ahead {way} MiB, {ms:.4f} ms, "
                    f"{ms / floor:.3f} x floor, {same=}",
                    flush=True,
                )
            del cache
            gc.collect()
        del params
        gc.collect()
    if failed:
        raise SystemExit("FAILED")


if __name__ == "__main__":
    typer.run(main)
