"""Check and time the LongFlow step and the window scores in Triton on a GPU.

    python benchmarks/longflow_device.py longflow.json --seconds 240

Timing is that of `jaxkv bench decode-attention` (`jaxkv.bench.attention`).
`kernels_us` is what the profiler saw of one pass over the layers, per kernel, without
the gaps between launches: where the loop takes much longer than their sum, it is the
host that is timed.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import typer
from longflow_checks import run_checks

from jaxkv.bench import attention as timing
from jaxkv.bench.clock import copy_bandwidth, time_loop
from jaxkv.bench.kernel_trace import kernel_times
from jaxkv.kernels.decode_triton import decode_attention_triton
from jaxkv.kernels.longflow_triton import Tiles, choose_tiles, longflow_attention_triton
from jaxkv.kernels.window_scores_triton import choose_tiles as choose_window_tiles
from jaxkv.kernels.window_scores_triton import window_scores_triton
from jaxkv.provenance import provenance, write_json

# batch, slots; 32 heads, 8 KV heads, head size 128, bfloat16
SHAPES = [(128, 3200), (64, 16384), (8, 3200), (1, 3200)]
SCALE = 128**-0.5
ROWS = [dict(splits=1, programs=p) for p in (342, 128)]
SWEEP = {
    128: [
        *ROWS,
        *[dict(splits=s, programs=0) for s in (1, 2)],
        dict(splits=1, programs=256, chunk=8192),
        dict(splits=1, programs=256, chunk=2048),
        dict(splits=1, programs=256, stages=2),
        dict(splits=1, programs=256, block=32, stages=4),
        dict(splits=1, programs=342, block=32, stages=4),
        dict(splits=1, programs=128, warps=8, block=128, stages=3, chunk=8192),
        dict(splits=1, programs=128, warps=8, block=64, stages=5, chunk=8192),
        dict(splits=1, programs=128, warps=4, block=64, stages=5, chunk=8192),
    ],
    64: [
        *ROWS,
        *[dict(splits=s, programs=0) for s in (1, 2, 4)],
        dict(splits=1, programs=256, stages=3),
        dict(splits=1, programs=128, warps=8, block=128, stages=3, chunk=8192),
        dict(splits=1, programs=128, warps=4, block=64, stages=5, chunk=8192),
    ],
    8: [
        *[dict(splits=s, programs=0) for s in (2, 3, 5, 6, 8)],
        dict(chunk=2048),
        dict(chunk=8192),
        dict(block=32, stages=4, splits=4),
        dict(warps=8, splits=2),
        dict(splits=1, programs=64, warps=8, chunk=8192),
    ],
    1: [
        *[dict(splits=s, warps=w) for s in (16, 25) for w in (4, 8)],
        dict(splits=32, warps=4),
        dict(splits=50, warps=4),
        dict(splits=25, warps=4, block=32, stages=4),
        dict(splits=33, warps=4, block=32, stages=4),
        dict(splits=16, warps=8, chunk=2048),
        dict(splits=16, warps=8, chunk=8192),
    ],
}
WINDOW_KEYS = (8192, 32768, 131072)
WINDOW_SWEEP = [
    dict(block=128),
    dict(block=128, stages=2),
    dict(rows=64, warps=4),
    dict(stages=2),
    dict(stages=4),
    dict(warps=4),
]


def with_tiles(query, token, slots, *, tiles):
    """Do one layer's step with these tiles; see `jaxkv.bench.attention.Step`."""
    oldest = jnp.zeros_like(token.position)
    return longflow_attention_triton(
        *(query, token, slots, oldest, token.position), scale=SCALE, tiles=tiles
    )


def time_version(layers: timing.Layers, version: str | Tiles) -> dict:
    """Time cuDNN, attention without a score, or LongFlow with these tiles."""
    named: dict[Any, Callable[..., Any]] = {
        "cudnn": functools.partial(timing.cudnn, scale=SCALE),
        "attention": functools.partial(decode_attention_triton, scale=SCALE),
    }
    step = named.get(version, functools.partial(with_tiles, tiles=version))
    found = layers.time(step, slots_first=version == "cudnn", profile=True)
    ms = 1e3 * statistics.median(found.seconds)
    shape = layers.shape
    record = dict(batch=shape.batch, slots=shape.slots, version=str(version), ms=ms)
    record |= dict(floor_ms=1e3 * layers.floor, ratio=ms / 1e3 / layers.floor)
    return record | dict(
        temporaries_mb=found.temporaries / 1e6, kernels_us=found.kernels_us
    )


def time_window(keys: int, changes: dict) -> dict:
    """Time the window scores of one layer: 32 queries, 32 heads, 8 KV heads of 128."""
    layers = max(1, math.ceil(2e8 / (keys * 8 * 128 * 2)))
    draw = jax.random.split(jax.random.key(0), layers + 1)
    q = jax.random.normal(draw[0], (1, 32, 32, 128), jnp.bfloat16)
    shape = (1, keys, 8, 128)
    k = tuple(jax.random.normal(d, shape, jnp.bfloat16) for d in draw[1:])
    start = jnp.full((1,), keys - 32, jnp.int32)
    tiles = choose_window_tiles(1, 8, 128, keys, 128, "bfloat16")
    tiles = dataclasses.replace(tiles, **changes)

    def step(state):
        start, k = state
        for layer in k:
            scores = window_scores_triton(
                q, layer, start, scale=0.088, length=keys - 32, tiles=tiles
            )
            # Makes the next layer wait for this one's scores; one small kernel more.
            start += (scores[:, 0, 0] < 0).astype(jnp.int32)
        return start, k

    iterations = max(2, math.ceil(0.03 / (layers * 4e-5)))
    seconds, state, _ = time_loop(step, (start, k), iterations)
    us = 1e6 * statistics.median(seconds) / layers
    record = dict(keys=keys, version=str(tiles), us=us)
    # One layer of Llama-3.1-8B: 218 M weights and causal attention, at 500 TFLOP/s.
    flops = 2 * 218e6 * keys + 2 * keys**2 * 4096
    record |= dict(percent_of_prefill=100 * us / 1e6 / (flops / 500e12))
    return record | dict(kernels_us=kernel_times(step, state, layers)[0])


def versions(batch: int, slots: int) -> list:
    """Return what is timed first: the shipped tiles and what they are compared with."""
    return ["attention", choose_tiles(batch, 32, 8, slots, 128, "bfloat16"), "cudnn"]


def sweep_versions(batch: int, slots: int) -> list[Tiles]:
    """Return other tiles worth a try."""
    shipped = choose_tiles(batch, 32, 8, slots, 128, "bfloat16")
    return [dataclasses.replace(shipped, **changes) for changes in SWEEP[batch]]


def show(record: dict) -> None:
    """Print one line."""
    if "us" in record:
        line = "window {keys:6} {us:8.1f} us {percent_of_prefill:6.2f} %  {version}"
    else:
        line = "{batch:4} {slots:6} {ms:8.4f} {ratio:6.3f} {version}"
    print(line.format(**record), record["kernels_us"], flush=True)


def summarise(records: list[dict]) -> None:
    """Print the best of each shape beside attention alone and cuDNN."""
    print("B, S, floor ms, attention, cuDNN, best (x floor, cost of the score)")
    for batch, slots in SHAPES:
        mine = [x for x in records if (x["batch"], x["slots"]) == (batch, slots)]
        named = {x["version"]: x["ms"] for x in mine}
        tiles = [x for x in mine if x["version"].startswith("Tiles")]
        if not tiles:
            continue
        best = min(tiles, key=lambda x: x["ms"])
        alone, theirs = (named.get(x, math.nan) for x in ("attention", "cudnn"))
        print(
            f"{batch:4} {slots:6} {best['floor_ms']:.4f} {alone:.4f} {theirs:.4f} "
            f"{best['ms']:.4f} ({best['ratio']:.3f} x, "
            f"{100 * (best['ms'] / alone - 1):+.1f} %) {best['version']}"
        )


def main(out: pathlib.Path, seconds: float = 240.0) -> None:
    """Check, time what is shipped, then sweep until the time is up."""
    deadline = time.perf_counter() + seconds
    report = provenance() | dict(checks=[], timings=[], windows=[])
    for record in run_checks():
        report["checks"].append(record)
        print(*record.values(), flush=True)
    report["copy_tb_per_s"] = copy_bandwidth(2**31) / 1e12
    print(f"copy {report['copy_tb_per_s']:.3f} TB/s", flush=True)

    def save(kind, record):
        report[kind].append(record)
        show(record)
        write_json(out, report)

    def left() -> float:
        return deadline - time.perf_counter()

    bandwidth = 1e12 * report["copy_tb_per_s"]
    for batch, slots in SHAPES:
        layers = timing.Layers(timing.Shape(batch=batch, slots=slots), bandwidth)
        for version in versions(batch, slots):
            save("timings", time_version(layers, version))
        del layers
    for keys in WINDOW_KEYS:
        save("windows", time_window(keys, {}))
    # What is left of the time is shared equally by the shapes, the windows one of them.
    for i, (batch, slots) in enumerate(SHAPES):
        until = left() * (1 - 1 / (len(SHAPES) + 1 - i))
        if left() <= 0:
            break
        layers = timing.Layers(timing.Shape(batch=batch, slots=slots), bandwidth)
        for version in sweep_versions(batch, slots):
            if left() > until:
                save("timings", time_version(layers, version))
        del layers
    for keys, changes in itertools.product(WINDOW_KEYS, WINDOW_SWEEP):
        if left() > 0:
            save("windows", time_window(keys, changes))
    summarise(report["timings"])
    # `shared` says what was checked, not what came out.
    if any(
        value is False
        for record in report["checks"]
        for name, value in record.items()
        if name != "shared"
    ):
        raise SystemExit("FAILED")


if __name__ == "__main__":
    typer.run(main)
