"""Check and time layers of one launch against layers of six and nine, on a GPU.

    python benchmarks/persistent_device.py persistent.json

LongFlow at 3,200 slots, random bfloat16 weights, each layer with its own. First 50
steps of one layer in one launch (`layer_triton.py`) are held against the same tiles in
six, bit for bit, on one cache; then loops over layers are timed, without embedding and
output layer; then launches that stop after a phase, whose differences say what phases
cost. Each way is a process of its own. All compile side by side, and none is timed
before all have compiled or were given up: what compiles takes time from what is timed.
Each result is on disk when it is printed.
"""

import dataclasses
import functools
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import layer_triton
import numpy as np
import typer
from layer_triton import PHASES, LayerTiles, Weights

from jaxkv.bench import clock
from jaxkv.bench.kernel_trace import trace_kernels
from jaxkv.kernels import (
    block,
    block_triton,
    longflow_triton,
    project_triton,
    triton_call,
)
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.scores import value_norms
from jaxkv.models.public_shapes import SHAPES
from jaxkv.provenance import provenance, write_json

BUDGET, EPS = 3200, 1e-6
ITERATIONS = 32
RUN_SECONDS = 0.8  # that are kept for each way
# Options of `layer_triton.choose_tiles`.
VARIANTS: dict[str, dict[str, Any]] = {
    "one launch": {},
    "one launch, 8 warps": dict(warps=8),
    "one launch, asks ahead": dict(ahead=256),
}
CUT = {f"up to {phase}": last for last, phase in enumerate(PHASES[:-1])}
WAYS = "check", "triton", "fused", *VARIANTS, *CUT
AS_MANY_WARPS: list[int] = []
LAUNCH = triton_call.call


def launch(kernel, *arguments, **options):
    """Let what joins splits add in the order of as many warps, where that is asked."""
    if AS_MANY_WARPS and kernel.__name__ == "finish_splits":
        options["num_warps"] = AS_MANY_WARPS[0]
    return LAUNCH(kernel, *arguments, **options)


def tiles_for(config, rows, **options) -> LayerTiles:
    """Return the tiles of a variant on this device."""
    c = config
    return layer_triton.choose_tiles(
        *(rows, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads),
        *(c.head_dim, BUDGET),
        num_sms=triton_call.num_processors(),
        shared=triton_call.shared_memory(),
        **options,
    )


def weights_of(config, key) -> Weights:
    """Draw a layer's weights; sums keep the size of what they add up."""
    c = config
    keys = iter(jax.random.split(key, 8))
    heads = c.num_heads * c.head_dim

    def draw(depth, columns):
        shape = depth, columns
        return depth**-0.5 * jax.random.normal(next(keys), shape, jnp.bfloat16)

    def near_one(size):
        return 1 + 0.1 * jax.random.normal(next(keys), (size,), jnp.bfloat16)

    norm = near_one(c.head_dim) if c.qk_norm else None
    return Weights(
        norm=near_one(c.hidden_size),
        qkv=draw(c.hidden_size, c.qkv_size),
        q_norm=norm,
        k_norm=norm,
        output=draw(heads, c.hidden_size),
        mlp_norm=near_one(c.hidden_size),
        gate_up=draw(c.hidden_size, 2 * c.intermediate_size),
        down=draw(c.intermediate_size, c.hidden_size),
    )


def cache_of(config, rows, key) -> Slots:
    """Return a full cache."""
    c = config
    shape = rows, c.num_kv_heads, BUDGET, c.head_dim
    keys, values = (
        jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key)
    )
    order = jnp.broadcast_to(jnp.arange(BUDGET, dtype=jnp.int32), shape[:3])
    target = jnp.zeros(shape[:2], jnp.int32)
    return Slots(keys, values, order, target, value_norms(values, "l1"))


def bounds(rows, step):
    """Return positions and what may be evicted."""
    position = jnp.full(rows, BUDGET, jnp.int32) + step
    return position, jnp.zeros(rows, jnp.int32), position


def one_launch(config, tiles, last=4):
    """Return a layer in one launch."""
    how = dict(num_heads=config.num_heads, eps=EPS, scale=config.head_dim**-0.5)

    def layer(x, w, cos, sin, slots, position, oldest, newest):
        return layer_triton.run_layer_triton(
            *(x, w, cos, sin, slots, position, oldest, newest),
            **how,
            tiles=tiles,
            last=last,
        )

    return layer


def many_launches(config, way: str):
    """Return a layer in six launches, "fused", or nine, "triton"."""
    c = config
    how: dict[str, Any] = dict(implementation=way)

    def layer(x, w, cos, sin, slots, position, oldest, newest):
        x, delta = x if isinstance(x, tuple) else (x, None)
        rows = x.shape[0]
        x, (q, k, v) = block.read_heads(
            *(x, delta, w.norm, w.qkv, w.q_norm, w.k_norm, cos, sin),
            **how | dict(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, eps=EPS),
        )
        out, slots = longflow_triton.longflow_attention_triton(
            *(q[:, 0], Token(k[:, 0], v[:, 0], position), slots, oldest, newest),
            scale=c.head_dim**-0.5,
        )
        x, delta = block.add_product(x, out.reshape(rows, 1, -1), w.output, **how)
        x, inner = block.read_gated(x, delta, w.mlp_norm, w.gate_up, eps=EPS, **how)
        x, delta = block.add_product(x, inner, w.down, **how)
        return x if delta is None else (x, delta), slots

    return layer


def same_tiles(config, tiles: LayerTiles):
    """Return a layer in six launches that are cut as the one launch is."""
    c = config

    def layer(x, w, cos, sin, slots, position, oldest, newest):
        rows = x.shape[0]
        q, k, v = block_triton.project_heads_triton(
            *(x, w.norm, w.qkv, w.q_norm, w.k_norm, cos, sin),
            **dict(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, eps=EPS),
            tiles=tiles.heads,
        )
        out, slots = longflow_triton.longflow_attention_triton(
            *(q[:, 0], Token(k[:, 0], v[:, 0], position), slots, oldest, newest),
            scale=c.head_dim**-0.5,
            tiles=tiles.attend,
        )
        out = out.reshape(rows, 1, -1)
        x = block_triton.project_add_triton(x, out, w.output, tiles=tiles.output)
        inner = project_triton.project_gated_triton(
            x, w.gate_up, norm=w.mlp_norm, eps=EPS, tiles=tiles.gates
        )
        return block_triton.project_add_triton(
            x, inner, w.down, tiles=tiles.down
        ), slots

    return layer


def checking(config, rows, tiles, steps=50):
    """Return what counts, per step, what differs between the two ways."""
    one, six = one_launch(config, tiles), same_tiles(config, tiles)

    def run(w, slots, xs, cos, sin):
        def step(carry, given):
            x, index = given
            ends = bounds(rows, index)
            a, first = one(x, w, cos, sin, carry[0], *ends)
            b, second = six(x, w, cos, sin, carry[1], *ends)
            pairs = zip((a, *first), (b, *second), strict=True)
            differ = jnp.stack([(p != q).sum() for p, q in pairs])
            error = jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max()
            return (first, second), (differ, error, jnp.isfinite(a).all())

        return jax.lax.scan(step, (slots, slots), (xs, jnp.arange(steps)))[1]

    return jax.jit(run)


def stepping(layer):
    """Return a loop of steps through all layers."""

    def loop(weights, caches, x0, cos, sin):
        def step(index, carry):
            caches, _ = carry
            x, done, ends = x0, [], bounds(x0.shape[0], index)
            for w, slots in zip(weights, caches, strict=True):
                x, slots = jax.jit(layer)(x, w, cos, sin, slots, *ends)
                done.append(slots)
            return tuple(done), block.added(*x) if isinstance(x, tuple) else x

        return jax.lax.fori_loop(0, ITERATIONS, step, (caches, x0))

    return jax.jit(loop, donate_argnums=1)


class Case:
    """One way at one shape and batch: its arrays and its program."""

    def __init__(self, shape: str, rows: int, way: str):
        self.config = c = SHAPES[shape]
        layers = c.num_layers if c.hidden_size < 1024 else 8
        keys = jax.random.split(jax.random.key(rows), 3)
        make = jax.jit(functools.partial(weights_of, c))
        self.weights = tuple(make(k) for k in jax.random.split(keys[0], layers))
        make = jax.jit(functools.partial(cache_of, c, rows))
        self.caches = tuple(make(k) for k in jax.random.split(keys[1], layers))
        shape_of_x = 50, rows, 1, c.hidden_size
        self.xs = jax.random.normal(keys[2], shape_of_x, jnp.bfloat16)
        angles = jnp.linspace(0, 3, rows * c.head_dim // 2, dtype=jnp.float32)
        angles = angles.reshape(rows, 1, -1)
        self.turn = jnp.cos(angles), jnp.sin(angles)
        self.way, self.tiles = way, tiles_for(c, rows, **VARIANTS.get(way, {}))
        if way == "check":
            AS_MANY_WARPS.append(self.tiles.warps)
            make = checking(c, rows, self.tiles)
            given = self.weights[0], self.caches[0], self.xs, *self.turn
        else:
            last = CUT.get(way, len(PHASES) - 1)
            many = way in ("triton", "fused")
            one = many_launches(c, way) if many else one_launch(c, self.tiles, last)
            make = stepping(one)
            given = self.weights, self.caches, self.xs[0], *self.turn
        self.program = make.lower(*given).compile()

    def run(self) -> dict[str, Any]:
        """Return what there is to say of it."""
        return self.check() if self.way == "check" else self.time()

    def check(self) -> dict[str, Any]:
        """Say at which steps what differs."""
        given = self.weights[0], self.caches[0], self.xs, *self.turn
        differ, error, finite = map(np.asarray, self.program(*given))
        found = zip(("stream", *Slots._fields), differ.sum(0), strict=True)
        counts = {name: int(number) for name, number in found if number}
        first = np.flatnonzero(differ.sum(1))[:1].tolist()
        right = not counts and bool(finite.all())
        said = dict(check="ok" if right else "DIFFERS", differ=counts, first_step=first)
        return said | dict(max_error=float(error.max()))

    def step(self) -> jax.Array:
        """Do all iterations; the caches are taken and replaced."""
        given = self.weights, self.caches, self.xs[0], *self.turn
        self.caches, x = self.program(*given)
        return x

    def time(self) -> dict[str, Any]:
        """Time a loop of steps, and ask the profiler what its kernels take."""
        times, count = [], ITERATIONS * len(self.weights)
        for _ in range(6):
            begin = time.perf_counter()
            jax.block_until_ready(self.step())
            times.append(1e6 * (time.perf_counter() - begin) / count)
        kernels, x = trace_kernels(self.step, count)
        said: dict[str, Any] = dict(us_a_layer=round(statistics.median(times[1:]), 2))
        said["kernels_us"] = round(sum(k.us for k in kernels.values()), 2)
        said |= dict(calls_us=[round(t, 2) for t in times])
        said |= dict(finite=bool(jnp.isfinite(x).all()), bytes=self.bytes())
        if self.way in VARIANTS:
            said["tiles"] = dataclasses.asdict(self.tiles)
        return said

    def bytes(self) -> list[int]:
        """Return what each phase must read."""
        w, slots = self.weights[0], self.caches[0]
        cache = slots.keys.nbytes + slots.values.nbytes
        first, *others = (p.nbytes for p in (w.qkv, w.output, w.gate_up, w.down))
        return [first, cache, *others]


def work(pipe, shape: str, rows: int, way: str) -> None:
    """Compile, say so, and when asked to, run and send what was found."""
    triton_call.call = launch
    try:
        case = Case(shape, rows, way)
        pipe.send(None)
        pipe.recv()
        pipe.send(case.run())
    except Exception as error:
        pipe.send(dict(failed=type(error).__name__, why=str(error)[-600:]))


def phases_of(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return what each phase of one shape and batch adds, and at what bandwidth."""
    names, found = [*CUT, "one launch"], {r["way"]: r for r in rows if "bytes" in r}
    if not all(name in found for name in names):
        return None
    until = [found[name]["kernels_us"] for name in names]
    took = np.diff(until, prepend=0.0).tolist()
    read = found["one launch"]["bytes"]
    return {
        phase: dict(us=round(us, 2), terabytes_a_second=round(b / 1e6 / us, 3))
        for phase, us, b in zip(PHASES, took, read, strict=True)
    }


def main(
    out: pathlib.Path,
    shapes: str = "smollm2-135m,qwen3-1.7b",
    batch: str = "1",
    seconds: float = 60,
) -> None:
    """Check, then time, in microseconds a layer."""
    deadline = time.perf_counter() + seconds
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # all share the device
    spawn = multiprocessing.get_context("spawn")
    cases = [(s, int(b)) for s in shapes.split(",") for b in batch.split(",")]
    jobs = []
    for shape, rows in cases:
        for way in WAYS:
            pipe, theirs = spawn.Pipe()
            process = spawn.Process(target=work, args=(theirs, shape, rows, way))
            process.start()
            theirs.close()
            jobs.append((shape, rows, way, pipe, process))
    report: dict[str, Any] = provenance() | dict(rows=[])
    waiting = {job[3] for job in jobs}
    compiled = deadline - RUN_SECONDS * len(jobs)
    while waiting and (left := compiled - time.perf_counter()) > 0:
        waiting -= set(multiprocessing.connection.wait(list(waiting), left))
    for *_, pipe, process in jobs:
        if pipe in waiting:
            process.kill()
    report["copy"] = clock.copy_bandwidth(1 << 30)
    for shape, rows, way, pipe, process in jobs:
        row: dict[str, Any] = dict(shape=shape, batch=rows, way=way)
        if pipe in waiting or time.perf_counter() > deadline:
            row["left_out"] = "not compiled" if pipe in waiting else "no time"
            process.kill()
        else:
            row |= answer(pipe)
        if "bytes" in row:
            row["floor_us"] = round(1e6 * sum(row["bytes"]) / report["copy"], 2)
        process.join()
        report["rows"].append(row)
        say(out, report, row)
    for shape, rows in cases:
        some = [r for r in report["rows"] if (r["shape"], r["batch"]) == (shape, rows)]
        if (phases := phases_of(some)) is not None:
            row = dict(shape=shape, batch=rows, phases=phases)
            report["rows"].append(row)
            say(out, report, row)
    if bad := [
        r for r in report["rows"] if "failed" in r or r.get("check") == "DIFFERS"
    ]:
        raise SystemExit(f"FAILED: {bad}")


def answer(pipe) -> dict[str, Any]:
    """Have a process that has compiled run, and return what it says."""
    try:
        failed = pipe.recv()
        if failed is not None:
            return failed
        pipe.send(None)
        return pipe.recv()
    except EOFError:
        return dict(failed="EOFError", why="the process has died")


def say(out: pathlib.Path, report: dict[str, Any], row: dict[str, Any]) -> None:
    """Write all results and print one."""
    write_json(out, report)
    short = {k: v for k, v in row.items() if k not in ("tiles", "bytes", "calls_us")}
    print(time.strftime("%X"), *(f"{k}={v}" for k, v in short.items()), flush=True)


if __name__ == "__main__":
    typer.run(main)
