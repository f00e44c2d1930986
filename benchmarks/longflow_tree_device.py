"""Check and time trees under LongFlow on a GPU, beside LongFlow's own step.

    python benchmarks/longflow_tree_device.py longflow-tree.json --seconds 55

Timing is that of `tree_device`: compiled loops over many layers' caches, one layer's
output the next one's query. `kernels_us` is what the profiler saw of each kernel,
without the gaps between launches. `ratio` is to LongFlow's own step of the same batch;
"and write" writes a whole path, too, as a step of speculative decoding does.

What remains is seen from trees of depth 4 beside those of `DEPTH`, and from two
kinds of queries: one layer's output is short, so that all slots weigh nearly the same
("even"); brought to the length of a drawn vector it picks some ("picks"). Each line
says how deep its tree is, and how long the lists are.

The checks compare with the XLA version in float32 and highest precision, which is
tested against the float32 reference.
"""

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from tree_device import TOLERANCE, make_tree

from jaxkv.bench.clock import time_loop
from jaxkv.bench.kernel_trace import kernel_times
from jaxkv.kernels.cache import Nodes, Slots, Token
from jaxkv.kernels.longflow_tree import longflow_tree
from jaxkv.kernels.longflow_tree_triton import (
    Tiles,
    choose_tiles,
    longflow_tree_triton,
)
from jaxkv.kernels.longflow_triton import longflow_attention_triton
from jaxkv.kernels.scores import value_norms
from jaxkv.kernels.tree_write import write_path
from jaxkv.provenance import provenance, write_json

# batch, nodes, heads, KV heads, slots, head size, dtype, score, shared
CHECKS = [  # the first before the timings, which it has compiled for; the last is slow
    (1, 16, 32, 8, 3200, 128, "bfloat16", "l1", True),
    (3, 16, 8, 8, 100, 64, "float16", "l2", False),
    (2, 9, 4, 1, 7, 64, "float32", "l1", True),
    (1, 64, 32, 8, 3200, 128, "bfloat16", "l1", True),
]
DEPTH = 10
# batch, nodes; 32 heads, 8 KV heads, 3200 slots, head size 128, bfloat16
SHAPES = [(1, 16), (1, 64), (8, 16), (8, 64)]
DEPTHS = [4]  # of the trees with one row and 16 nodes that are timed, too
MOST = {16: 1.35, 64: 1.7}  # times LongFlow's own step
SWEEP: list[dict[str, Any]] = [
    dict(chunk=256),
    dict(chunk=1024),
    dict(listed=16),
    dict(heads=1),
    dict(heads=4),
    dict(apart=False),
    dict(block=64),
    dict(rows=64, warps=4),
    dict(rows=64, warps=4, block=64),
    dict(stages=4),
    dict(stages=2),
]


def make_inputs(
    batch,
    nodes,
    heads,
    kv_heads,
    slots,
    head_dim,
    dtype,
    score,
    *,
    seed=0,
    most_depth=DEPTH,
):
    """Return the arguments of `longflow_tree` by name, and a path of each tree.

    The first row of several is full; the others have free slots, which hold NaN.
    """
    rng = np.random.default_rng(seed)
    draw = jax.random.split(jax.random.key(seed), 5)
    shapes = [(nodes, heads), *[(nodes, kv_heads)] * 2, *[(kv_heads, slots)] * 2]
    q, k, v, keys, values = (
        jax.random.normal(key, (batch, *shape, head_dim), jnp.dtype(dtype))
        for key, shape in zip(draw, shapes, strict=True)
    )
    order = rng.permuted(np.broadcast_to(np.arange(slots), (batch, slots)), axis=-1)
    free = np.zeros((batch, slots), bool)
    free[1:, rng.integers(0, slots, slots // 50)] = True
    held = np.where(free, -1, order)[:, None]
    held = np.broadcast_to(held, (batch, kv_heads, slots)).astype(np.int32)
    nan = jnp.asarray(np.where(held < 0, np.nan, 0)[..., None], dtype)
    target = np.broadcast_to(rng.integers(0, slots, (batch, 1)), (batch, kv_heads))
    depths, ancestors, path, count = make_tree(rng, batch, nodes, most_depth)
    numbers = jnp.arange(nodes, dtype=jnp.int32)
    is_parent = ancestors & (depths[:, None] == depths[:, :, None] - 1)
    parents = jnp.where(is_parent, numbers, 0).max(-1).astype(jnp.int32)
    cache = Slots(
        *(keys + nan, values + nan, jnp.asarray(held)),
        *(jnp.asarray(target, jnp.int32), value_norms(values, score)),
    )
    position = jnp.full(batch, slots, jnp.int32)
    arrays = dict(
        query=q,
        nodes=Nodes(k, v, position),
        slots=cache,
        oldest=jnp.full(batch, slots // 8, jnp.int32),
        parents=parents,
        depths=depths,
    )
    return arrays, path, count


def check(*shape) -> dict:
    """Compare one shape with XLA, and two runs with each other."""
    *sizes, dtype, score, shared = shape
    arrays, _, _ = make_inputs(*shape[:-1])
    options: dict[str, Any] = dict(
        n_recent=1, depth=DEPTH, scale=sizes[-1] ** -0.5, score=score
    )
    options |= dict(shared=shared)
    exact = functools.partial(longflow_tree, implementation="xla", **options)
    wide = jax.tree.map(
        lambda x: x.astype("float32") if x.dtype == dtype else x, arrays
    )
    with jax.default_matmul_precision("highest"):
        want = jax.tree.map(np.asarray, jax.jit(exact)(**wide))
    run = jax.jit(functools.partial(longflow_tree_triton, **options))
    runs = [[np.asarray(x) for x in run(**arrays)] for _ in range(2)]
    out, slots, targets = runs[0]
    # After another victim a path is another one: what follows may differ, too.
    same = np.logical_and(slots == want.slots, targets == want.targets).all(1)
    error = abs(out.astype("float32") - want.out) / np.maximum(1, abs(want.out))
    error = np.where(same[:, :, None, None], error, 0).max()
    bits = zip(*runs, strict=True)
    return dict(
        shape=str(shape),
        error=float(error),
        close=bool(error <= TOLERANCE[dtype]),
        others=int((~same).sum()),
        victims=bool((~same).mean() <= (0.0 if dtype == "float32" else 0.02)),
        repeats=all(x.tobytes() == y.tobytes() for x, y in bits),
    )


class Layers:
    """The caches of one shape: 36 layers, or fewer that leave the L2 cache behind."""

    def __init__(self, batch: int, nodes: int, depth: int = DEPTH):
        self.batch, self.nodes, self.depth = batch, nodes, depth
        shape = (batch, nodes, 32, 8, 3200, 128, "bfloat16", "l1")
        self.num = 36 if batch == 1 else max(4, math.ceil(1e9 / (1.3e7 * batch)))
        layers = [
            make_inputs(*shape, seed=seed, most_depth=depth) for seed in range(self.num)
        ]
        arrays, self.path, self.count = layers[0]
        self.q = arrays.pop("query")
        self.caches = [layer[0]["slots"] for layer in layers]
        del arrays["slots"]
        self.arrays = arrays

    def attend(self, version, q, cache):
        """Do one layer's operation: tiles, or the name of something else."""
        arrays, scale = self.arrays, 0.088
        nodes, oldest = arrays["nodes"], arrays["oldest"]
        if version == "longflow":
            token = Token(nodes.key[:, 0], nodes.value[:, 0], nodes.position)
            out, cache = longflow_attention_triton(
                *(q[:, 0], token, cache, oldest, nodes.position), scale=scale
            )
            return jnp.broadcast_to(out[:, None], q.shape), cache
        options: dict[str, Any] = dict(n_recent=0, depth=self.depth, scale=scale)
        run: Callable[..., Any]
        if version == "xla":
            run = functools.partial(longflow_tree, implementation="xla")
        else:
            tiles = version if isinstance(version, Tiles) else None
            run = functools.partial(longflow_tree_triton, tiles=tiles)
        out, slots, targets = run(query=q, slots=cache, **arrays, **options)
        if version == "and write":
            along = jnp.take_along_axis(targets, self.path[:, None], axis=2)
            upcoming = jnp.concatenate([slots[..., :1], along], axis=2)
            cache = write_path(nodes, cache, self.path, upcoming, self.count)
        else:  # for XLA not to leave out the choice
            if version == "picks":
                size = jnp.linalg.norm(out.astype("float32"), axis=-1, keepdims=True)
                length = out.shape[-1] ** 0.5
                out = (out * (length / jnp.maximum(size, 1e-6))).astype(out.dtype)
            out += (targets.min() < 0).astype(out.dtype)
        return out, cache

    def tiles(self) -> Tiles:
        """Return what is shipped."""
        shape = self.batch, 32, 8, self.nodes, 3200, 128, "bfloat16"
        return choose_tiles(*shape, depth=self.depth, shared=True)

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
        iterations = max(4, math.ceil(0.02 / (self.num * 3e-5 * self.batch**0.5)))
        calls, state, temporaries = time_loop(step, state, iterations)
        seconds = statistics.median(calls)
        kernels, _ = kernel_times(step, state, self.num)
        tiles = version if isinstance(version, Tiles) else self.tiles()
        record = dict(batch=self.batch, nodes=self.nodes, version=str(version))
        record |= dict(most_depth=self.depth, listed=tiles.listed)
        record |= dict(deepest=int(self.arrays["depths"].max()))
        record |= dict(us=1e6 * seconds / self.num, temporaries_mb=temporaries / 1e6)
        return record | dict(kernels_us=kernels)


def attempt(report, kind, out, run, **what) -> dict:
    """Do one check or one timing; save and print it, or its failure."""
    try:
        record = run()
    except Exception as error:
        record = what | dict(failed=f"{type(error).__name__}: {str(error)[:400]}")
    if "us" in record:
        own = next(
            (
                x["us"]
                for x in report[kind]
                if (x["batch"], x["version"]) == (record["batch"], "longflow")
            ),
            record["us"],
        )
        record["ratio"] = record["us"] / own
    report[kind].append(record)
    write_json(out, report)
    if "us" in record:
        line = "{batch:3} {nodes:3} {us:8.2f} us {ratio:6.3f} {version}, trees up to "
        line += "{most_depth} deep (deepest {deepest}), lists of {listed}"
        print(line.format(**record), record["kernels_us"], flush=True)
    else:
        print(*record.values(), flush=True)
    return record


def main(
    out: Annotated[pathlib.Path, typer.Argument(help="Where the JSON goes.")],
    seconds: Annotated[float, typer.Option(help="When to stop.")] = 55.0,
) -> None:
    """Check, time what is shipped beside LongFlow's own step, check more, then sweep.

    Each shape is compiled for, some seconds; the numbers aimed at come first.
    """
    deadline = time.perf_counter() + seconds
    report: dict[str, Any] = provenance() | dict(checks=[], timings=[])
    print("shape, error, close, nodes with others' victims, few, two runs alike")

    def checks(shapes):
        for shape in shapes:
            if time.perf_counter() >= deadline:
                print(*shape, "not checked: no time was left", flush=True)
                continue
            run = functools.partial(check, *shape)
            attempt(report, "checks", out, run, shape=shape)

    checks(CHECKS[:1])

    def timings(layers, versions):
        for version in versions:
            if time.perf_counter() < deadline:
                what = dict(
                    batch=layers.batch, nodes=layers.nodes, version=str(version)
                )
                run = functools.partial(layers.time, version)
                attempt(report, "timings", out, run, **what)

    print("batch, nodes, us a layer, times LongFlow's step, version, us of each kernel")
    for batch, nodes in SHAPES:
        if time.perf_counter() < deadline:
            own = any(
                (x["batch"], x["version"]) == (batch, "longflow")
                for x in report["timings"]
            )
            first = [] if own else ["longflow"]
            picks = ["picks"] if batch == 1 else []
            timings(Layers(batch, nodes), [*first, "shipped", *picks])
        if (batch, nodes) == SHAPES[0]:
            for depth in DEPTHS:
                if time.perf_counter() < deadline:
                    timings(Layers(batch, nodes, depth), ["shipped"])
    checks(CHECKS[1:])
    for batch, nodes in SHAPES:
        if time.perf_counter() < deadline:
            layers = Layers(batch, nodes)
            tiles = layers.tiles()
            others = [dataclasses.replace(tiles, **changes) for changes in SWEEP]
            timings(layers, ["and write", "xla", *others])
    for record in report["timings"]:
        is_aim = record["version"] == "shipped" and record.get("most_depth") == DEPTH
        if is_aim and record.get("us"):
            most = MOST[record["nodes"]]
            print(
                f"{record['batch']:3} {record['nodes']:3} {record['ratio']:.3f} times "
                f"LongFlow's own step; {most} was aimed at"
            )
    names = "close", "victims", "repeats"
    bad = [x for x in report["checks"] if not all(x.get(name) for name in names)]
    if bad:
        raise SystemExit(f"FAILED: {bad}")


if __name__ == "__main__":
    typer.run(main)
