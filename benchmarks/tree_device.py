"""Check and time the Triton attention of trees, and the writing of paths, on a GPU.

    python benchmarks/tree_device.py tree.json --seconds 60

Timing is that of `decode_attention_device`: compiled loops over many layers' caches,
one layer's output the next one's query. `kernels_us` is what the profiler saw of each
kernel, without the gaps between launches. What fails is recorded and passed over.

The checks compare with the XLA version in float32 and highest precision, which is
tested against the float32 reference: that one, written out for 64 nodes, would compile
for minutes.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer

from jaxkv.bench.clock import time_loop
from jaxkv.bench.kernel_trace import kernel_times
from jaxkv.kernels.cache import Nodes, Slots, Token
from jaxkv.kernels.decode_triton import decode_attention_triton
from jaxkv.kernels.tree_attention import tree_attention
from jaxkv.kernels.tree_triton import (
    Tiles,
    choose_tiles,
    tree_attention_triton,
    write_path_triton,
)
from jaxkv.kernels.tree_write import write_path
from jaxkv.provenance import provenance, write_json

# batch, nodes, heads, KV heads, slots, head size, dtype
CHECKS = [
    (1, 16, 32, 8, 3200, 128, "bfloat16"),
    (1, 64, 32, 8, 3200, 128, "bfloat16"),
    (16, 16, 32, 8, 3200, 128, "bfloat16"),
    (3, 7, 12, 2, 777, 96, "float16"),
    (3, 64, 8, 8, 100, 64, "bfloat16"),
    (1, 1, 24, 2, 513, 64, "bfloat16"),
    (3, 16, 16, 1, 333, 256, "bfloat16"),
    (3, 7, 8, 2, 250, 128, "float32"),
    (1, 64, 4, 1, 70, 64, "float32"),
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 1.6e-2, "float16": 2e-3}
DEPTH = 10

# batch, nodes; 32 heads, 8 KV heads, 3200 slots, head size 128, bfloat16
SHAPES = [(1, 16), (1, 64), (4, 16), (4, 64), (16, 16), (16, 64)]
SWEEP: dict[
    int, list[dict[str, Any]]
] = {  # by nodes, changes of the shipped tiles; splits for one row are divided
    16: [
        dict(apart=False),
        dict(block=64),
        dict(block=64, warps=8),
        dict(splits=25),
        dict(splits=33, block=32),
        dict(splits=8, block=64),
        dict(rows=32, splits=16),
        dict(stages=4),
        dict(stages=2),
    ],
    64: [
        dict(apart=True),
        dict(rows=64, warps=4, splits=4, apart=False),
        dict(rows=64, warps=4, splits=8),
        dict(rows=64, warps=4, splits=4, block=64, apart=False),
        dict(rows=128, warps=8, splits=8, block=64),
        dict(rows=128, warps=8, splits=16),
        dict(rows=128, warps=8, splits=4),
        dict(stages=4),
        dict(stages=2),
    ],
}


def make_tree(rng, batch, nodes, depth):
    """Return depths and ancestors of random trees no deeper than `depth`, and paths."""
    parents, depths = np.zeros((2, batch, nodes), np.int32)
    ancestors = np.broadcast_to(np.eye(nodes, dtype=bool), (batch, nodes, nodes)).copy()
    for row in range(batch):
        for node in range(1, nodes):
            # Mostly chains: the newest node that is not too deep already.
            above = np.flatnonzero(depths[row, :node] < depth)
            parent = above[-1] if rng.random() < 0.7 else rng.choice(above)
            parents[row, node], depths[row, node] = parent, depths[row, parent] + 1
            ancestors[row, node] |= ancestors[row, parent]
    paths = np.zeros((batch, depth + 1), np.int32)
    count = np.zeros(batch, np.int32)
    for row in range(batch):
        node = int(depths[row].argmax())
        count[row] = depths[row, node] + 1
        for step in range(depths[row, node], -1, -1):
            paths[row, step], node = node, parents[row, node]
    return tuple(map(jnp.asarray, (depths, ancestors, paths, count)))


def make_inputs(batch, nodes, heads, kv_heads, slots, head_dim, dtype, *, evict, seed):
    """Return the arguments of `tree_attention`, a path of each tree, and its length.

    Free slots hold NaN. With `evict` the slots of the paths are any, and come back.
    """
    rng = np.random.default_rng(seed)
    draw = jax.random.split(jax.random.key(seed), 5)
    shapes = [(nodes, heads), (nodes, kv_heads), (nodes, kv_heads)]
    shapes += [(kv_heads, slots)] * 2
    q, k, v, keys, values = (
        jax.random.normal(key, (batch, *shape, head_dim), jnp.dtype(dtype))
        for key, shape in zip(draw, shapes, strict=True)
    )
    free = max(1, min(DEPTH + 2, slots // 2))
    upcoming = slots - free + np.arange(DEPTH + 2) % free
    upcoming = np.broadcast_to(upcoming, (batch, kv_heads, DEPTH + 2)).astype(np.int32)
    occupied = np.broadcast_to(np.arange(slots), (batch, kv_heads, slots))
    if evict:
        upcoming = rng.integers(0, slots, upcoming.shape).astype(np.int32)
        upcoming[:, :, 3:5] = upcoming[:, :, :2]
        free = rng.integers(0, slots, (batch, kv_heads, 1))
    positions = np.where(occupied < slots - free, occupied, -1).astype(np.int32)
    nan = jnp.asarray(np.where(positions < 0, np.nan, 0)[..., None], dtype)
    tree = make_tree(rng, batch, nodes, DEPTH)
    upcoming = jnp.asarray(upcoming)
    nodes = Nodes(k, v, jnp.full(batch, slots, jnp.int32))
    target = jnp.copy(upcoming[..., 0])
    cache = Slots(keys + nan, values + nan, jnp.asarray(positions), target)
    return q, nodes, cache, upcoming, *tree


def check(batch, nodes, heads, kv_heads, slots, head_dim, dtype) -> dict:
    """Compare one shape with XLA, and two runs with each other; then write a path."""
    shape = (batch, nodes, heads, kv_heads, slots, head_dim, dtype)
    *args, path, count = make_inputs(*shape, evict=True, seed=0)
    scale = head_dim**-0.5
    exact = functools.partial(tree_attention, scale=scale, implementation="xla")
    wide = jax.tree.map(lambda x: x.astype("float32") if x.dtype == dtype else x, args)
    with jax.default_matmul_precision("highest"):
        want = np.asarray(jax.jit(exact)(*wide))
    attend = jax.jit(functools.partial(tree_attention_triton, scale=scale))
    runs = [np.asarray(attend(*args)) for _ in range(2)]
    error = abs(runs[0].astype("float32") - want) / np.maximum(1, abs(want))
    _, new, cache, upcoming, _, _ = args
    position = new.position.at[-1].set(-1)
    count = jnp.where(position < 0, 0, count)
    writes = new._replace(position=position), cache, path, upcoming, count
    wrote = jax.jit(write_path_triton)(*writes)
    plain = jax.jit(functools.partial(write_path, implementation="xla"))(*writes)
    same = [
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(wrote[:4], plain[:4], strict=True)
    ]
    tiles = choose_tiles(batch, heads, kv_heads, nodes, slots, head_dim, dtype)
    return dict(
        shape=str(shape),
        tiles=str(tiles),
        error=float(error.max()),
        close=bool(error.max() <= TOLERANCE[dtype]),
        repeats=runs[0].tobytes() == runs[1].tobytes(),
        written=all(same),
    )


class Layers:
    """The caches of one shape: 36 layers, or fewer that leave the L2 cache behind."""

    def __init__(self, batch: int, nodes: int):
        self.batch, self.nodes = batch, nodes
        shape = (batch, nodes, 32, 8, 3200, 128, "bfloat16")
        make = functools.partial(make_inputs, *shape, evict=False)
        self.num = 36 if batch == 1 else max(4, math.ceil(1e9 / (1.3e7 * batch)))
        layers = [make(seed=seed) for seed in range(self.num)]
        self.q, self.new = layers[0][:2]
        self.rest = layers[0][3:]  # upcoming, depths, ancestors, path, count
        self.caches = [layer[2] for layer in layers]

    def attend(self, version, q, cache):
        """Do one layer's operation: tiles, or the name of something else."""
        new, (upcoming, depths, ancestors, path, count) = self.new, self.rest
        if version == "plain":
            token = Token(new.key[:, 0], new.value[:, 0], new.position)
            out, cache = decode_attention_triton(q[:, 0], token, cache, scale=0.088)
            return jnp.broadcast_to(out[:, None], q.shape), cache
        if version in ("write", "write xla"):
            how: Any = dict(implementation="triton" if version == "write" else "xla")
            return q, write_path(new, cache, path, upcoming, count, **how)
        args = q, new, cache, upcoming, depths, ancestors
        if version == "xla":
            return tree_attention(*args, scale=0.088, implementation="xla"), cache
        return tree_attention_triton(*args, scale=0.088, tiles=version), cache

    def time(self, version) -> dict:
        """Time one version over all layers."""

        def step(state):
            q, caches = state
            new = []
            for cache in caches:
                q, cache = self.attend(version, q, cache)
                new.append(cache)
            return q, new

        # A failure must not take the caches with it, so a copy is donated.
        state = jax.tree.map(jnp.copy, (self.q, self.caches))
        iterations = max(4, math.ceil(0.02 / (self.num * 2e-5 * self.batch**0.5)))
        calls, state, temporaries = time_loop(step, state, iterations)
        seconds = statistics.median(calls)
        kernels, _ = kernel_times(step, state, self.num)
        record = dict(batch=self.batch, nodes=self.nodes, version=str(version))
        record |= dict(us=1e6 * seconds / self.num, temporaries_mb=temporaries / 1e6)
        return record | dict(kernels_us=kernels)


def shipped(batch: int, nodes: int) -> Tiles:
    """Return the tiles that `choose_tiles` gives a shape of `SHAPES`."""
    return choose_tiles(batch, 32, 8, nodes, 3200, 128, "bfloat16")


def others(batch: int, nodes: int) -> list[Tiles]:
    """Return other tiles worth a try, those for one row spread over `batch`."""
    tiles = shipped(batch, nodes)
    found = [tiles]
    for changes in SWEEP[nodes]:
        splits = changes.get("splits", tiles.splits * batch)
        splits = max(1, round(splits / batch))
        apart = changes.get("apart", tiles.apart) and splits > 1
        changes = changes | dict(splits=splits, apart=apart)
        found.append(dataclasses.replace(tiles, **changes))
    return list(dict.fromkeys(found))[1:]


def attempt(report, kind, out, run, **what) -> None:
    """Do one check or one timing; save and print it, or its failure."""
    try:
        record = run()
    except Exception as error:
        record = what | dict(failed=f"{type(error).__name__}: {str(error)[:400]}")
    report[kind].append(record)
    write_json(out, report)
    if "us" in record:
        line = "{batch:3} {nodes:3} {us:8.2f} us {temporaries_mb:7.1f} MB {version}"
        print(line.format(**record), record["kernels_us"], flush=True)
    else:
        print(*record.values(), flush=True)


def main(
    out: Annotated[pathlib.Path, typer.Argument(help="Where the JSON goes.")],
    seconds: Annotated[float, typer.Option(help="When to stop.")] = 60.0,
) -> None:
    """Check, time what is shipped beside XLA and plain decoding, then sweep."""
    deadline = time.perf_counter() + seconds
    report: dict[str, Any] = provenance() | dict(checks=[], timings=[])
    for shape in CHECKS:
        attempt(report, "checks", out, functools.partial(check, *shape), shape=shape)

    def timings(batch, nodes, versions):
        if time.perf_counter() > deadline:
            return
        layers = Layers(batch, nodes)
        for version in versions:
            if time.perf_counter() < deadline:
                run = functools.partial(layers.time, version)
                what = dict(batch=batch, nodes=nodes, version=str(version))
                attempt(report, "timings", out, run, **what)

    print("batch, nodes, us a layer, temporaries, version, us of each kernel")
    for batch, nodes in SHAPES[:2]:
        names = ["plain", "write", "write xla"] if nodes == 16 else ["write"]
        timings(batch, nodes, [shipped(batch, nodes), "xla", *names])
    for batch, nodes in SHAPES[:2]:
        timings(batch, nodes, others(batch, nodes))
    for batch, nodes in SHAPES[2:]:
        names = ["xla", "plain"] if nodes == 16 else ["xla"]
        timings(batch, nodes, [shipped(batch, nodes), *names])
    for batch, nodes in SHAPES[2:]:
        timings(batch, nodes, others(batch, nodes))
    bad = [
        x
        for x in report["checks"]
        if "failed" in x or not (x["close"] and x["repeats"] and x["written"])
    ]
    if bad:
        raise SystemExit(f"FAILED: {bad}")


if __name__ == "__main__":
    typer.run(main)
