"""A layer in one launch: bit for bit what six launches do, and compiled.

The kernel is not in the library: `benchmarks/layer_triton.py`. Run as a script, this
file is its own worker; `triton_on_cpu` says why.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import (
    block_triton,
    longflow_triton,
    project_triton,
    triton_call,
)
from jaxkv.kernels.cache import Slots, Token
from jaxkv.kernels.project_triton import Tiles
from jaxkv.kernels.scores import value_norms

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import layer_triton

EPS = 1e-6
# hidden, inner, heads, KV heads, head size, slots
SHAPES = {
    "smollm2": (576, 1536, 9, 3, 64, 3200),
    "qwen3-1.7b": (2048, 6144, 16, 8, 128, 3200),
    "qwen3-8b": (4096, 12288, 32, 8, 128, 3200),
}
# rows, hidden, inner, heads, KV heads, head size, slots; parts of the products; block
# of slots and splits; norm of heads, score, shared
FAST = [
    ((1, 128, 192, 4, 2, 32, 40), (1, 1, 1), (16, 3), True, "l1", True),
    ((3, 192, 128, 2, 2, 64, 21), (3, 2, 1), (16, 1), False, "l2", False),
]
SLOW = [
    ((9, 256, 192, 6, 2, 64, 70), (2, 2, 3), (32, 2), True, "l1", True),
    ((33, 128, 128, 2, 1, 128, 33), (1, 2, 2), (16, 2), True, "l2", True),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("rows", [1, 8])
def test_layers_compile_without_spills(rows, name):
    pytest.importorskip("triton")
    sizes = rows, *SHAPES[name]
    tiles = layer_triton.choose_tiles(*sizes)
    usage = compiled(sizes, tiles)
    print(name, rows, tiles, usage)
    assert usage["stack"] == 0 and usage["local"] == 0, usage
    assert usage["shared"] <= 227 * 1024


def compiled(sizes, tiles):
    import layer_triton_body

    constants = layer_triton.layer_constants(
        *(*sizes, EPS, 0.1, "l1", True, tiles), head_norm=True
    )
    kernel = layer_triton_body.run_layer
    dtypes = dict.fromkeys(kernel.arg_names, "bfloat16")
    floats = "cos sin norms sums squares parts statistic logits _norms_out"
    integers = "positions target position oldest newest counters minima arrivals"
    dtypes |= {f"{n}_ptr": "float32" for n in floats.split()}
    dtypes |= {f"{n}_ptr": "int32" for n in integers.split()}
    dtypes |= {f"_{n}_out_ptr": "int32" for n in ("positions", "target")}
    phases = dict(FIRST=0, LAST=4)
    launch = dataclasses.replace(tiles.gates, warps=tiles.warps, stages=2)
    return triton_on_cpu.usage(kernel, dtypes, constants | phases, launch, 90)


@triton_on_cpu.fast_and_slow
def test_interpreted_layers_have_the_bits_of_six_launches(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


def tiles_of(case):
    _, parts, (block, splits), *_ = case
    first, second, last = (
        Tiles(parts=p, block=b, depth=64, warps=4, stages=2)
        for p, b in zip(parts, (64, 16, 64), strict=True)
    )
    attend = longflow_triton.Tiles(
        splits=splits, block=block, warps=4, stages=2, chunk=64
    )
    gates = Tiles(parts=1, block=32, depth=64, warps=4, stages=2)
    return layer_triton.LayerTiles(
        programs=5,
        warps=4,
        ahead=0,
        heads=first,
        attend=attend,
        output=second,
        gates=gates,
        down=last,
    )


def inputs(case, seed=0):
    (rows, hidden, inner, heads, kv_heads, size, slots), *_, head_norm, score, _ = case
    rng = np.random.default_rng(seed)

    def draw(*shape, scale=1.0):
        return jnp.asarray(scale * rng.standard_normal(shape), "bfloat16")

    weights = layer_triton.Weights(
        norm=1 + draw(hidden, scale=0.1),
        qkv=draw(hidden, (heads + 2 * kv_heads) * size, scale=hidden**-0.5),
        q_norm=draw(size) if head_norm else None,
        k_norm=draw(size) if head_norm else None,
        output=draw(heads * size, hidden, scale=(heads * size) ** -0.5),
        mlp_norm=1 + draw(hidden, scale=0.1),
        gate_up=draw(hidden, 2 * inner, scale=hidden**-0.5),
        down=draw(inner, hidden, scale=inner**-0.5),
    )
    angles = rng.uniform(-3, 3, (rows, 1, size // 2))
    turn = [jnp.asarray(f(angles), "float32") for f in (np.cos, np.sin)]
    # Every row has free slots, and the second is finished.
    positions = rng.permuted(np.tile(np.arange(slots) - 3, (rows, kv_heads, 1)), axis=2)
    values = draw(rows, kv_heads, slots, size)
    target = rng.integers(0, slots, (rows, 1))
    cache = Slots(
        keys=draw(rows, kv_heads, slots, size),
        values=values,
        positions=jnp.asarray(positions, "int32"),
        target=jnp.asarray(np.tile(target, kv_heads), "int32"),
        norms=value_norms(values, score),
    )
    position = jnp.where(jnp.arange(rows) == 1, -1, slots)
    oldest = jnp.full(rows, 4, jnp.int32)
    return draw(rows, 1, hidden), weights, *turn, cache, position, oldest, position - 2


def in_six_launches(arrays, case, tiles):
    """Return what `run_layer_triton` does, launch by launch."""
    x, w, cos, sin, cache, position, oldest, newest = arrays
    (rows, _, _, heads, kv_heads, size, _), *_, score, shared = case
    q, k, v = block_triton.project_heads_triton(
        *(x, w.norm, w.qkv, w.q_norm, w.k_norm, cos, sin),
        **dict(num_heads=heads, num_kv_heads=kv_heads, eps=EPS, tiles=tiles.heads),
    )
    out, cache = longflow_triton.longflow_attention_triton(
        *(q[:, 0], Token(k[:, 0], v[:, 0], position), cache, oldest, newest),
        **dict(scale=size**-0.5, score=score, shared=shared, tiles=tiles.attend),
    )
    out = out.reshape(rows, 1, -1)
    x = block_triton.project_add_triton(x, out, w.output, tiles=tiles.output)
    inner = project_triton.project_gated_triton(
        x, w.gate_up, norm=w.mlp_norm, eps=EPS, tiles=tiles.gates
    )
    return block_triton.project_add_triton(x, inner, w.down, tiles=tiles.down), cache


def in_one_launch(arrays, case, tiles):
    *_, score, shared = case
    how = dict(num_heads=case[0][3], eps=EPS, scale=case[0][5] ** -0.5)
    return layer_triton.run_layer_triton(
        *arrays, **how, score=score, shared=shared, tiles=tiles
    )


def check(case) -> list[str]:
    arrays, tiles = inputs(case), tiles_of(case)
    names = "stream", *Slots._fields
    out, slots = in_six_launches(arrays, case, tiles)
    got, got_slots = in_one_launch(arrays, case, tiles)
    failures = []
    for name, a, b in zip(names, (out, *slots), (got, *got_slots), strict=True):
        a, b = (np.asarray(x.astype("float32")) for x in (a, b))
        if not np.array_equal(a, b) or not np.isfinite(a).all():
            failures.append(f"{case}: {name} differs")
    return failures


class Phased:
    """A kernel whose phases are launches, since programs run one after the other."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*arrays, FIRST, LAST, **constants):
            for phase in range(FIRST, LAST + 1):
                self.kernel[grid](*arrays, FIRST=phase, LAST=phase, **constants)

        return run


def call(kernel, *arguments, **options):
    kernel = Phased(kernel) if "FIRST" in options else kernel
    return triton_on_cpu.call(kernel, *arguments, **options)


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = call
    failures = []
    for case in {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]:
        failures += check(case)
    print(json.dumps(failures))
