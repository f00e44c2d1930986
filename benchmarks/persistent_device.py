"""Check and time layers of one launch against layers of six and nine, on a GPU.

    python benchmarks/persistent_device.py persistent.json --seconds 120

LongFlow at 3,200 slots, random bfloat16 weights, each layer with its own, in one
process. First 50 steps of one layer in one launch (`layer_triton.py`) are held
against the same tiles in six, bit for bit, on one cache; then loops over layers are
timed, without embedding and output layer. What is cut in other ways, and what phases
cost, comes last, as far as the seconds go. Each result is on disk when it is printed.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import pathlib
import statistics
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import layer_triton
import numpy as np
import typer
from layer_triton import LayerTiles, Weights

from jaxkv.bench import clock
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
# Options of `layer_triton.choose_tiles`; of products, how much wider blocks are, and
# how many times as many parts there are.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, tuple[float, int]]]] = {
    "8 warps": ({}, {}),
    "4 warps": (dict(warps=4), {}),
    "4 warps, two a processor": (dict(warps=4, per_processor=2), {}),
    "asks for nothing": (dict(ahead=0), {}),
    "asks for more": (dict(ahead=1024), {}),
    "output and down wider": ({}, dict(output=(2, 1), down=(2, 1))),
    "output and down in parts": ({}, dict(output=(4, 4), down=(4, 4))),
    "heads in more parts, narrow gates": ({}, dict(heads=(1, 2), gates=(0.5, 1))),
    "4 warps, two, nothing": (dict(warps=4, per_processor=2, ahead=0), {}),
}
CHECKED = "8 warps", "4 warps, two a processor"
ELSEWHERE = 5  # variants that are timed at other batches than the first
AS_MANY_WARPS = threading.local()
LAUNCH = triton_call.call


def launch(kernel, *arguments, **options):
    """Let what joins splits add in the order of as many warps, where that is asked."""
    warps = getattr(AS_MANY_WARPS, "warps", None)
    if warps and kernel.__name__ == "finish_splits":
        options["num_warps"] = warps
    return LAUNCH(kernel, *arguments, **options)


def tiles_for(config, rows, variant: str, num_sms: int) -> LayerTiles:
    """Return the tiles of a variant."""
    c, (options, products) = config, VARIANTS[variant]
    tiles = layer_triton.choose_tiles(
        *(rows, c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads),
        *(c.head_dim, BUDGET),
        num_sms=num_sms,
        **options,
    )
    depths = dict(output=c.num_heads * c.head_dim, down=c.intermediate_size)
    for name, (wider, more) in products.items():
        old, depth = getattr(tiles, name), depths.get(name, c.hidden_size)
        block = (
            old.block if name == "heads" else max(16, min(64, int(wider * old.block)))
        )
        parts = next(n for n in range(old.parts * more, 0, -1) if depth % (n * 64) == 0)
        new = layer_triton.product_tiles(
            *(rows, depth, block, parts, tiles.warps, 220_000),
            wide=2 if name == "gates" else 1,
        )
        tiles = dataclasses.replace(tiles, **{name: new})
    return tiles


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
            **dict(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, eps=EPS),
            **how,
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
    """Return what compiles a count, per step, of what differs between the two ways."""
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

    def compile_it(*arguments):
        AS_MANY_WARPS.warps = tiles.warps
        try:
            return jax.jit(run).lower(*arguments).compile()
        finally:
            AS_MANY_WARPS.warps = None

    return compile_it


def stepping(layer, layers, iterations):
    """Return a loop of steps through all layers."""

    def loop(weights, caches, x0, cos, sin):
        def step(index, carry):
            caches, _ = carry
            x, done, ends = x0, [], bounds(x0.shape[0], index)
            for w, slots in zip(weights, caches, strict=True):
                x, slots = jax.jit(layer)(x, w, cos, sin, slots, *ends)
                done.append(slots)
            return tuple(done), block.added(*x) if isinstance(x, tuple) else x

        return jax.lax.fori_loop(0, iterations, step, (caches, x0))

    return jax.jit(loop, donate_argnums=1)


class Bench:
    """One shape and batch: arrays, and results as they come."""

    def __init__(self, report, out, name, config, rows, layers, bandwidth):
        self.report, self.out, self.name, self.rows = report, out, name, rows
        self.config = c = config
        self.iterations = 64
        keys = jax.random.split(jax.random.key(rows), 3)
        make = jax.jit(functools.partial(weights_of, config))
        self.weights = tuple(make(k) for k in jax.random.split(keys[0], layers))
        self.keys = jax.random.split(keys[1], layers)
        self.fill()
        shape = 50, rows, 1, c.hidden_size
        self.xs = jax.random.normal(keys[2], shape, jnp.bfloat16)
        angles = jnp.linspace(0, 3, rows * c.head_dim // 2, dtype=jnp.float32)
        angles = angles.reshape(rows, 1, -1)
        self.turn = jnp.cos(angles), jnp.sin(angles)
        weight_bytes = sum(a.nbytes for a in jax.tree.leaves(self.weights)) / layers
        cache_bytes = self.caches[0].keys.nbytes + self.caches[0].values.nbytes
        self.floor_us = 1e6 * (weight_bytes + cache_bytes) / bandwidth

    def fill(self) -> None:
        """Make all caches anew."""
        make = jax.jit(functools.partial(cache_of, self.config, self.rows))
        self.caches = tuple(map(make, self.keys))

    def say(self, row: dict[str, Any]) -> None:
        """Print a result and write all of them."""
        row = dict(shape=self.name, batch=self.rows) | row
        self.report["rows"].append(row)
        write_json(self.out, self.report)
        short = {k: v for k, v in row.items() if k != "tiles"}
        print(time.strftime("%X"), *(f"{k}={v}" for k, v in short.items()), flush=True)

    def check(self, tiles, program) -> None:
        """Run the comparison; say at which steps what differs."""
        arguments = self.weights[0], self.caches[0], self.xs, *self.turn
        begin = time.perf_counter()
        differ, error, finite = map(np.asarray, program(*arguments))
        names = "stream", *Slots._fields
        counts = {n: int(d) for n, d in zip(names, differ.sum(0), strict=True) if d}
        first = [int(i) for i in np.flatnonzero(differ.sum(1))[:1]]
        said = dict(warps=tiles.warps, differ=counts, first_step=first)
        said |= dict(max_error=float(error.max()), finite=bool(finite.all()))
        right = not counts and said["finite"]
        seconds = round(time.perf_counter() - begin, 3)
        self.say(dict(check="ok" if right else "DIFFERS", seconds=seconds) | said)

    def time(self, way: str, program, **more) -> None:
        """Time a loop of steps."""
        layers, times = len(self.weights), []
        for _ in range(5):
            begin = time.perf_counter()
            self.caches, x = program(self.weights, self.caches, self.xs[0], *self.turn)
            finite = bool(jnp.isfinite(x).all())
            times.append((time.perf_counter() - begin) / self.iterations / layers)
        us = 1e6 * statistics.median(times[1:])
        said = dict(way=way, us_a_layer=round(us, 2), floor_us=round(self.floor_us, 2))
        self.say(said | dict(ratio=round(us / self.floor_us, 3), finite=finite) | more)

    def jobs(self, variants: list[str], num_sms: int, cut: bool):
        """Yield what is to be done: how to compile it, and how to run that."""
        c, state = self.config, (self.weights, self.caches, self.xs[0], *self.turn)
        of = functools.partial(
            jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)
        )

        def loop(layer):
            shapes = of(state)
            return lambda: (
                stepping(layer, len(self.weights), self.iterations)
                .lower(*shapes)
                .compile()
            )

        tiles = {n: tiles_for(c, self.rows, n, num_sms) for n in variants}
        checked = of((self.weights[0], self.caches[0], self.xs, *self.turn))
        for name in CHECKED:
            t = tiles.get(name)
            if t is not None:
                make = checking(c, self.rows, t)
                yield (
                    f"check {name}",
                    functools.partial(make, *checked),
                    functools.partial(self.check, t),
                )
        for way in ("triton", "fused"):
            yield way, loop(many_launches(c, way)), functools.partial(self.time, way)
        for name, t in tiles.items():
            more = dict(tiles=dataclasses.asdict(t))
            run = functools.partial(self.time, f"one launch, {name}", **more)
            yield name, loop(one_launch(c, t)), run
        if cut:
            for last, phase in enumerate(layer_triton.PHASES[:-1]):
                run = functools.partial(self.time, f"one launch, up to {phase}")
                yield phase, loop(one_launch(c, tiles["8 warps"], last)), run


def main(
    out: pathlib.Path,
    shapes: str = "smollm2-135m,qwen3-1.7b,qwen3-8b",
    batch: str = "1,8",
    seconds: float = 120,
    variants: int = len(VARIANTS),
    cut: bool = True,
    threads: int = 12,
) -> None:
    """Check, then time, in microseconds a layer."""
    deadline = time.perf_counter() + seconds
    bandwidth = clock.copy_bandwidth(1 << 30)
    report: dict[str, Any] = provenance() | dict(copy=bandwidth, rows=[])
    num_sms = triton_call.num_processors()
    triton_call.call = launch
    batches = [int(b) for b in batch.split(",")]
    cases = [(shape, rows) for shape in shapes.split(",") for rows in batches]
    for done, (shape, rows) in enumerate(cases):
        config = SHAPES[shape]
        layers = config.num_layers if config.hidden_size < 1024 else 8
        bench = Bench(report, out, shape, config, rows, layers, bandwidth)
        some = variants if rows == batches[0] else min(variants, ELSEWHERE)
        left = (deadline - time.perf_counter()) / (len(cases) - done)
        jobs = bench.jobs(list(VARIANTS)[:some], num_sms, cut and rows == batches[0])
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        pending = [(name, pool.submit(make), run) for name, make, run in jobs]
        # All are compiled before any is timed.
        concurrent.futures.wait([p for _, p, _ in pending], timeout=max(1.0, left - 3))
        pool.shutdown(wait=False, cancel_futures=True)
        for name, program, run in pending:
            try:
                run(program.result(0))
            except (TimeoutError, concurrent.futures.CancelledError):
                bench.say(dict(left_out=name))
            except Exception as error:
                bench.say(dict(failed=name, why=str(error)[-600:]))
                bench.fill()
        del bench, pending
        gc.collect()
    bad = [r for r in report["rows"] if "failed" in r or r.get("check") == "DIFFERS"]
    if bad:
        raise SystemExit(f"FAILED: {bad}")


if __name__ == "__main__":
    typer.run(main)
