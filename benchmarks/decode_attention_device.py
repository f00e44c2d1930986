"""Check and time the Triton decode attention on a GPU.

    python benchmarks/decode_attention_device.py decode_attention.json

Every number is the median over calls of the loop that `jaxkv.bench.attention` has.
"""

import dataclasses
import functools
import itertools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv.bench import attention as timing
from jaxkv.bench.clock import copy_bandwidth
from jaxkv.kernels.decode import decode_attention
from jaxkv.kernels.decode_triton import Tiles, choose_tiles, decode_attention_triton
from jaxkv.provenance import write_json

# batch, heads, KV heads, slots, head size, dtype, splits (None: as shipped)
CHECKS = [
    (16, 32, 8, 3200, 128, "bfloat16", None),
    (3, 32, 8, 3199, 128, "bfloat16", 1),
    (1, 32, 8, 3200, 128, "bfloat16", None),
    (5, 12, 2, 777, 96, "float16", 3),
    (16, 32, 8, 3200, 96, "bfloat16", None),
    (2, 8, 8, 100, 64, "bfloat16", 2),
    (2, 24, 1, 513, 64, "bfloat16", 4),
    (4, 16, 2, 333, 256, "bfloat16", None),
    (3, 8, 2, 250, 128, "float32", None),
    (2, 4, 1, 7, 64, "float32", 1),
]
TOLERANCE = {"float32": 5e-6, "bfloat16": 1.6e-2, "float16": 2e-3}

# batch, slots, share of occupied slots; 32 heads, 8 KV heads, head size 128, bfloat16
SHAPES = [(128, 3200, 1.0), (1, 3200, 1.0), (8, 3200, 1.0), (64, 16384, 1.0)]
SHAPES += [(32, 3200, 1.0), (128, 512, 1.0), (128, 3200, 0.5)]
SPLITS = {1: (8, 25, 50), 8: (3, 5, 6), 32: (1, 3, 4), 64: (1, 4), 128: (1, 3)}


def check(batch, heads, kv_heads, slots, head_dim, dtype, splits) -> dict:
    """Compare with the reference, and check aliasing and that two runs are equal."""
    share = 1.0 if splits is None else 0.6
    shape = timing.Shape(
        batch=batch,
        slots=slots,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    query, token, cache = timing.make_inputs(shape, share)
    # The last row is finished.
    token = token._replace(position=token.position.at[-1].set(-1))
    scale = head_dim**-0.5
    tiles = choose_tiles(batch, kv_heads, slots, head_dim, dtype)
    tiles = dataclasses.replace(tiles, splits=splits or tiles.splits)
    reference = functools.partial(decode_attention, implementation="reference")
    want = jax.jit(functools.partial(reference, scale=scale))(query, token, cache)
    step = functools.partial(decode_attention_triton, scale=scale, tiles=tiles)
    run = jax.jit(step, donate_argnums=2)
    runs = []
    for _ in range(2):
        mine = jax.tree.map(jnp.copy, cache)
        before = [x.unsafe_buffer_pointer() for x in mine[:3]]
        got, new = run(query, token, mine)
        in_place = before == [x.unsafe_buffer_pointer() for x in new[:3]]
        runs.append([np.asarray(x) for x in (got, *new[:3])])
    raw = [[x.tobytes() for x in arrays] for arrays in runs]
    # Equal bits, NaN of free slots included: nothing but the target was written.
    same_cache = raw[0][1:] == [np.asarray(x).tobytes() for x in want[1][:3]]
    out, right = (np.asarray(x).astype(np.float32) for x in (runs[0][0], want[0]))
    error = (np.abs(out - right) / np.maximum(1, np.abs(right))).max()
    record = dict(shape=cache.keys.shape, dtype=dtype, heads=heads, tiles=str(tiles))
    record |= dict(error=float(error), close=bool(error <= TOLERANCE[dtype]))
    return record | dict(same=same_cache, in_place=in_place, repeats=raw[0] == raw[1])


def versions(batch, slots, sweep) -> list[Tiles | None]:
    """Return the shipped tiles and None for XLA, or other tiles worth a try."""
    shipped = choose_tiles(batch, 8, slots, 128, "bfloat16")
    if not sweep:
        return [shipped, None]
    other = functools.partial(dataclasses.replace, shipped)
    return [
        *(other(splits=splits) for splits in SPLITS[batch]),
        other(stages=5 - shipped.stages),
        other(warps=12 - shipped.warps),
        other(block=128, warps=8, stages=2),
        other(block=32, warps=4, stages=4),
    ]


def time_shape(batch, slots, share, sweep, bandwidth):
    """Yield one record per version of one shape."""
    shape = timing.Shape(batch=batch, slots=slots)
    layers = timing.Layers(shape, bandwidth, share=share)
    for tiles in versions(batch, slots, sweep):
        if tiles:
            attend = functools.partial(decode_attention_triton, tiles=tiles)
        else:
            attend = functools.partial(decode_attention, implementation="xla")

        found = layers.time(functools.partial(attend, scale=shape.scale))
        seconds = statistics.median(found.seconds)
        name = str(tiles) if tiles else "xla"
        record = dict(batch=batch, slots=slots, occupied=layers.occupied, tiles=name)
        record |= dict(ms=1e3 * seconds, floor_ms=1e3 * layers.floor)
        record |= dict(ratio=seconds / layers.floor)
        yield record | dict(temporaries_mb=found.temporaries / 1e6)


def main(out: pathlib.Path, seconds: float = 55.0) -> None:
    """Check, then time the shipped tiles and XLA, then others until time is up."""
    deadline = time.perf_counter() + seconds
    report = dict(device=jax.devices()[0].device_kind, checks=[], timings=[])
    for case in CHECKS:
        report["checks"].append(check(*case))
        print(*report["checks"][-1].values(), flush=True)
    bandwidth = copy_bandwidth(2**30)
    report["copy_tb_per_s"] = bandwidth / 1e12
    print(f"copy {bandwidth / 1e12:.2f} TB/s; B, S, full, ms, floor ms, ratio, tmp MB")
    for sweep, shape in itertools.product([False, True], SHAPES):
        if time.perf_counter() > deadline or (sweep and shape[2] < 1):
            continue
        for record in time_shape(*shape, sweep, bandwidth):
            report["timings"].append(record)
            print(
                "{batch:4} {slots:6} {occupied:5.2f} {ms:8.4f} {floor_ms:8.4f} "
                "{ratio:6.3f} {temporaries_mb:7.1f} {tiles}".format(**record),
                flush=True,
            )
            write_json(out, report)
            if time.perf_counter() > deadline:
                break
    if any(x is False for record in report["checks"] for x in record.values()):
        raise SystemExit("FAILED")


if __name__ == "__main__":
    typer.run(main)
