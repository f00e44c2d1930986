"""Check and time decode steps with fewer launches and with more, on a GPU.

    python benchmarks/launches_device.py launches.json

Whole steps of LongFlow at 3,200 slots, random bfloat16 weights, in one process, so that
old and new are timed on one warm machine: layers launch by launch ("triton") or "fused"
(`kernels/block.py`). Before, the fused operations are held against those launch by
launch, and rows among others against the same row alone, bit for bit.
"""

import dataclasses
import gc
import itertools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import typer

from jaxkv.bench import clock, decode_step
from jaxkv.kernels import block
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


def check(config: Config) -> list[str]:
    """Return what is wrong with the fused operations at the sizes of a network."""
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
            **dict(num_heads=c.num_heads, num_kv_heads=c.num_kv_heads, eps=1e-6),
            **options,
        )
        _, gated = block.read_gated(turn[0], None, norm, gate_up, eps=1e-6, **options)
        sums = [
            block.added(*block.add_product(turn[0], *pair, **options))
            for pair in ((turn[1], output), (turn[2] * inner**-0.5, down))
        ]
        return [a.reshape(rows, -1).astype(jnp.float32) for a in (*heads, gated, *sums)]

    names = "queries", "keys", "values", "gates", "output", "down"
    want, got, alone = run(64, "triton"), run(64, "fused"), run(1, "fused")
    failures = []
    for name, a, b in zip(names, want, got, strict=True):
        error = float(jnp.abs(a - b).max() / jnp.abs(a).max())
        print(f"  {name}: off by {error:.5f} of the largest")
        failures += [f"{name} are off by {error}"] * (not error < 2**-6)
    for rows in (2, 8, 17, 33, 64):
        for name, a, b in zip(names, alone, run(rows, "fused"), strict=True):
            same = bool((a[-1] == b[-1]).all())
            failures += [f"{name}: other bits among {rows} rows"] * (not same)
    return failures


def main(
    out: pathlib.Path,
    shapes: str = "smollm2-135m,qwen3-1.7b,qwen3-8b",
    batch: str = "1,8,32",
    ways: str = "triton,fused",
    steps: int = 64,
    repeats: int = 5,
    profile: bool = True,
) -> None:
    """Time steps, in milliseconds, per shape, batch and way, each from a new cache."""
    bandwidth = clock.copy_bandwidth(1 << 30)
    report: dict[str, Any] = provenance() | dict(copy=bandwidth, rows=[])
    options = Options(budget=BUDGET, decode=LongFlow())
    failures: list[str] = []
    for shape in shapes.split(","):
        config = SMOLLM2 if shape == "smollm2-135m" else SHAPES[shape]
        if jax.default_backend() == "gpu":
            failures += check(config)
        params = random_parameters(config, jax.random.key(0), jnp.bfloat16)
        for rows, way in itertools.product(map(int, batch.split(",")), ways.split(",")):
            timing = decode_step.time_decode(
                Decoder(config, implementation=way),
                params,
                batch=rows,
                context=BUDGET,
                steps=steps,
                repeats=repeats,
                options=options,
                bandwidth=bandwidth,
                profile=profile,
            )
            row = dict(shape=shape, way=way) | dataclasses.asdict(timing)
            report["rows"].append(row)
            write_json(out, report | dict(failures=failures))
            print(
                f"{shape} {rows} {way}: {timing.step_ms:.4f} ms, "
                f"{timing.ratio_to_floor:.3f} x floor",
                flush=True,
            )
            for name, kernel in timing.kernels.items():
                print(f"  {name}: {kernel.us:.1f} us, {kernel.launches:.0f} launches")
            gc.collect()
        del params
        gc.collect()
    if failures:
        raise SystemExit("FAILED\n" + "\n".join(failures))


if __name__ == "__main__":
    typer.run(main)
