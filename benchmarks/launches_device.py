"""Check and time decode steps with fewer launches and with more, on a GPU.

    python benchmarks/launches_device.py launches.json

Whole steps of LongFlow at 3,200 slots, random bfloat16 weights, in one process, so that
old and new are timed on one warm machine: layers launch by launch ("triton") or "fused"
(`kernels/block.py`). After that, the fused operations are held against those launch by
launch, and rows among others against the same row alone, bit for bit.

    python benchmarks/launches_device.py tiles.json --shapes qwen3-1.7b --batch 1,8 \
        --layers 8 --ways triton,fused,deep,narrow,half,thin

Other ways than these two are "fused" with other tiles (`CHANGES`), and are checked
likewise. With `--layers` the step has fewer of them, and compiles sooner.
"""

import contextlib
import dataclasses
import gc
import pathlib
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import typer

from jaxkv.bench import clock, decode_step
from jaxkv.kernels import block, block_triton, project_triton
from jaxkv.kernels.project_triton import Tiles
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, random_parameters
from jaxkv.models.public_shapes import SHAPES
from jaxkv.options import Options
from jaxkv.policies.longflow import LongFlow
from jaxkv.provenance import provenance, write_json

BUDGET = 3200
# What a way cuts otherwise than "fused": of heads, of what is added, of gates.
CHANGES: dict[str, dict[str, dict[str, int]]] = {
    # Half as many rounds, and the norm's weights come four bytes a thread.
    "deep": {"gates": dict(depth=256), "heads": dict(depth=256)},
    # Sums that are not shared out need no joining.
    "narrow": {"adds": dict(block=16, parts=1, depth=256)},
    # Two parts to be joined instead of four.
    "half": {"adds": dict(block=32, parts=2, depth=128)},
    "two": {"heads": dict(parts=2), "adds": dict(block=32, parts=2, depth=128)},
    # More programs than processors.
    "thin": {"gates": dict(block=32)},
    # All that seems to help.
    "deep+narrow": {
        "gates": dict(depth=256),
        "heads": dict(depth=256),
        "adds": dict(block=16, parts=1, depth=256),
    },
}


def changed(
    tiles: Tiles, changes: dict[str, int], rows: int, depth: int, of_column: int
) -> Tiles:
    """Return tiles with changes, as far as shared memory lets them fetch ahead."""
    tiles = dataclasses.replace(tiles, **changes)
    while depth // tiles.parts % tiles.depth:
        tiles = dataclasses.replace(tiles, depth=tiles.depth // 2)
    width = tiles.block * of_column + project_triton.padded(rows)
    stages = project_triton.shared_memory() // (2 * tiles.depth * width)
    return dataclasses.replace(tiles, stages=max(2, min(4, stages)))


@contextlib.contextmanager
def cut(way: str) -> Iterator[str]:
    """Let "fused" use the tiles of a way; the name of the implementation comes out."""
    changes = CHANGES.get(way, {})
    of_block, of_gates = block_triton.choose_tiles, project_triton.choose_tiles

    def choose_block(rows, depth, columns, *, pairs=0, **sizes):
        tiles = of_block(rows, depth, columns, pairs=pairs, **sizes)
        found = changes.get("heads" if pairs else "adds")
        return changed(tiles, found, rows, depth, 1) if found else tiles

    def choose_gates(rows, depth, columns, *, gated=False, **sizes):
        tiles = of_gates(rows, depth, columns, gated=gated, **sizes)
        found = changes.get("gates") if gated else None
        return changed(tiles, found, rows, depth, 2) if found else tiles

    jax.clear_caches()  # which know nothing of tiles
    with (
        mock.patch.object(block_triton, "choose_tiles", choose_block),
        mock.patch.object(project_triton, "choose_tiles", choose_gates),
    ):
        yield "fused" if way in CHANGES else way
    jax.clear_caches()


def check(config: Config, sizes: tuple[int, ...]) -> list[str]:
    """Return what is wrong with the fused operations at the sizes of a network.

    Rows among as many as `sizes` are held against the row alone; the last of them
    against the operations launch by launch.
    """
    c, half = config, config.head_dim // 2
    keys = iter(jax.random.split(jax.random.key(2), 9))

    def draw(*shape, scale=1.0):
        return scale * jax.random.normal(next(keys), shape, jnp.bfloat16)

    size, inner = c.num_heads * c.head_dim, c.intermediate_size
    x, norm = draw(64, 1, c.hidden_size), 1 + draw(c.hidden_size, scale=0.1)
    of_heads = 1 + draw(c.head_dim, scale=0.1)
    qkv = draw(c.hidden_size, c.qkv_size, scale=c.hidden_size**-0.5)
    gate_up = draw(c.hidden_size, 2 * inner, scale=c.hidden_size**-0.5)
    output, down = draw(size, c.hidden_size), draw(inner, c.hidden_size)
    out, middle = draw(64, 1, size, scale=size**-0.5), draw(64, 1, inner)
    angles = jnp.arange(64.0)[:, None, None] * jnp.ones(half)

    def run(rows, how):
        # The first row comes last.
        turn = [jnp.roll(a[:rows], -1, 0) for a in (x, out, middle, angles)]
        options: dict[str, Any] = dict(implementation=how)
        _, heads = block.read_heads(
            *(turn[0], None, norm, qkv, of_heads, of_heads),
            *(jnp.cos(turn[3]), jnp.sin(turn[3])),
            **options | dict(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads),
            eps=1e-6,
        )
        _, gated = block.read_gated(turn[0], None, norm, gate_up, eps=1e-6, **options)
        sums = [
            block.added(*block.add_product(turn[0], *pair, **options))
            for pair in ((turn[1], output), (turn[2] * inner**-0.5, down))
        ]
        return [a.reshape(rows, -1).astype(jnp.float32) for a in (*heads, gated, *sums)]

    names = "queries", "keys", "values", "gates", "output", "down"
    want, got = run(sizes[-1], "triton"), run(sizes[-1], "fused")
    alone = run(1, "fused")
    failures = []
    for name, a, b in zip(names, want, got, strict=True):
        error = float(jnp.abs(a - b).max() / jnp.abs(a).max())
        print(f"  {name}: off by {error:.5f} of the largest")
        failures += [f"{name} are off by {error}"] * (not error < 2**-6)
    for rows in sizes:
        for name, a, b in zip(names, alone, run(rows, "fused"), strict=True):
            same = bool((a[-1] == b[-1]).all())
            failures += [f"{name}: other bits among {rows} rows"] * (not same)
    return failures


def main(
    out: pathlib.Path,
    shapes: str = "smollm2-135m,qwen3-1.7b,qwen3-8b",
    batch: str = "1,8,32",
    ways: str = "triton,fused",
    layers: int | None = None,
    steps: int = 64,
    repeats: int = 5,
    profile: bool = True,
    seconds: float = 600.0,
) -> None:
    """Time steps, in milliseconds, per shape, batch and way, each from a new cache.

    What is not begun after `seconds` is left out. A way that fails says why.
    """
    deadline = time.perf_counter() + seconds
    bandwidth = clock.copy_bandwidth(1 << 30)
    report: dict[str, Any] = provenance() | dict(copy=bandwidth, rows=[])
    report |= dict(changes=CHANGES, failures={})
    for shape in shapes.split(","):
        config = SHAPES[shape]
        if layers:
            config = dataclasses.replace(config, num_layers=layers)
        params = random_parameters(config, jax.random.key(0), jnp.bfloat16)
        for way in ways.split(","):
            with cut(way) as how:
                for rows in map(int, batch.split(",")):
                    if time.perf_counter() > deadline:
                        break
                    row = attempt(
                        *(time_way, config, how, params, rows, bandwidth),
                        **dict(steps=steps, repeats=repeats, profile=profile),
                    )
                    if isinstance(row, str):
                        report["failures"][f"{shape}, {way}, {rows}"] = row
                    else:
                        row = dict(shape=shape, way=way, layers=config.num_layers) | row
                        report["rows"].append(row)
                        show(row)
                    write_json(out, report)
                    gc.collect()
                if jax.default_backend() == "gpu" and how == "fused":
                    sizes = (8,) if way in CHANGES else (2, 8, 17, 33, 64)
                    found = attempt(check, config, sizes)
                    if found:
                        report["failures"][f"{shape}, {way}"] = found
                    write_json(out, report)
        del params
        gc.collect()
    if report["failures"]:
        raise SystemExit(f"FAILED\n{report['failures']}")


def attempt(function: Any, *arguments: Any, **options: Any) -> Any:
    """Return what a function does, or why it does not."""
    try:
        return function(*arguments, **options)
    except Exception as error:  # other ways go on
        return f"{type(error).__name__}: {str(error)[:400]}"


def time_way(
    config: Config, how: Any, params: Any, rows: int, bandwidth: float, **options: Any
) -> dict[str, Any]:
    """Time one way at one batch size."""
    timing = decode_step.time_decode(
        Decoder(config, implementation=how),
        params,
        batch=rows,
        context=BUDGET,
        options=Options(budget=BUDGET, decode=LongFlow()),
        bandwidth=bandwidth,
        **options,
    )
    return dataclasses.asdict(timing)


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    print(
        f"{row['shape']} {row['batch']} {row['way']}: {row['step_ms']:.4f} ms, "
        f"{row['ratio_to_floor']:.3f} x floor, "
        f"{1e3 * row['step_ms'] / row['layers']:.1f} us a layer",
        flush=True,
    )
    for name, kernel in row["kernels"].items():
        print(f"  {name}: {kernel['us']:.1f} us, {kernel['launches']:.0f} launches")


if __name__ == "__main__":
    typer.run(main)
