"""Layers in six launches: against float64, the Triton kernels interpreted.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import (
    block,
    block_triton,
    dispatch,
    project_triton,
    triton_call,
)
from jaxkv.kernels.block_triton import choose_tiles
from jaxkv.kernels.project_triton import Tiles
from jaxkv.models.config import Config
from jaxkv.models.decoder import Decoder, random_parameters

EPS = 1e-6
# rows, depth, query heads, KV heads, head size, norm of heads, parts
FAST = [
    (1, 192, 2, 1, 64, True, 1),
    (3, 192, 6, 1, 32, False, 3),
    (33, 256, 2, 1, 64, True, 2),
]
SLOW = [
    (1, 384, 4, 2, 128, True, 1),
    (17, 384, 4, 2, 128, True, 3),
    (64, 256, 2, 1, 256, False, 2),
    (16, 256, 2, 2, 64, True, 4),
]
# Triton's interpreter truncates to bfloat16, and a number is rounded three times.
TOLERANCE = 4 * 2**-8


def draw(rng, *shape, scale=1.0):
    """Return float64 numbers that are exact in bfloat16."""
    numbers = jnp.asarray(scale * rng.standard_normal(shape), "bfloat16")
    return np.asarray(numbers.astype("float32"), np.float64)


def norm_oracle(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def heads_oracle(x, norm, weight, q_norm, k_norm, angles, heads, kv_heads):
    """Return queries, keys and values in float64."""
    rows, half = angles.shape
    split = (norm_oracle(x, norm) @ weight).reshape(rows, -1, 2 * half)
    out = []
    for part, scale in (
        (split[:, :heads], q_norm),
        (split[:, heads : heads + kv_heads], k_norm),
    ):
        part = part if scale is None else norm_oracle(part, scale)
        turned = (part[..., :half] + 1j * part[..., half:]) * np.exp(
            1j * angles[:, None]
        )
        out.append(np.concatenate([turned.real, turned.imag], -1))
    return *out, split[:, heads + kv_heads :]


def gated_oracle(x, norm, weight):
    gate, up = np.split(norm_oracle(x, norm) @ weight, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def off(got, want) -> float:
    """Return the largest error, in tolerances of the largest number."""
    got = np.asarray(got.astype("float32"), np.float64).reshape(want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max() / TOLERANCE)


def inputs(case, seed=0):
    rows, depth, heads, kv_heads, size, head_norm, _ = case
    rng = np.random.default_rng(seed)
    columns = (heads + 2 * kv_heads) * size
    x = draw(rng, rows, depth, scale=3.0)
    norm = 1 + draw(rng, depth, scale=0.25)
    norm = np.asarray(jnp.asarray(norm, "bfloat16").astype("float32"), np.float64)
    weight = draw(rng, depth, columns, scale=depth**-0.5)
    of_heads = [draw(rng, size) if head_norm else None for _ in range(2)]
    angles = rng.uniform(-3, 3, (rows, size // 2))
    return x, norm, weight, *of_heads, angles


def short(x):
    return None if x is None else jnp.asarray(x, "bfloat16")


def tiles_of(case, block):
    tile = 64
    return Tiles(parts=case[-1], block=block, depth=tile, warps=4, stages=2)


def heads_of(case, arrays):
    x, norm, weight, q_norm, k_norm, angles = arrays
    turn = (jnp.asarray(f(angles)[:, None], "float32") for f in (np.cos, np.sin))
    return block_triton.project_heads_triton(
        *(short(x)[:, None], *map(short, (norm, weight, q_norm, k_norm)), *turn),
        num_heads=case[2],
        num_kv_heads=case[3],
        eps=EPS,
        tiles=tiles_of(case, case[4]),
    )


def check_heads(case) -> list[str]:
    arrays = inputs(case)
    x, norm, weight, q_norm, k_norm, angles = arrays
    want = heads_oracle(x, norm, weight, q_norm, k_norm, angles, *case[2:4])
    got = heads_of(case, arrays)
    worst = max(off(g, w) for g, w in zip(got, want, strict=True))
    return [f"project_heads {case}: off by {worst}"] * (not worst < 1)


def check_gated(case) -> list[str]:
    x, norm, weight, *_ = inputs(case)
    tiles = Tiles(parts=1, block=64, depth=64, warps=4, stages=2)
    got = project_triton.project_gated_triton(
        *(short(x)[:, None], short(weight)), norm=short(norm), eps=EPS, tiles=tiles
    )
    worst = off(got, gated_oracle(x, norm, weight))
    return [f"project_gated {case}: off by {worst}"] * (not worst < 1)


def add_of(case, x, weight, stream):
    return block_triton.project_add_triton(
        *(short(stream)[:, None], short(x)[:, None], short(weight)),
        tiles=tiles_of(case, 16 if case[-1] == 1 else 64),
    )


def check_add(case) -> list[str]:
    x, _, weight, *_ = inputs(case)
    stream = draw(np.random.default_rng(1), len(x), weight.shape[1])
    worst = off(add_of(case, x, weight, stream), stream + x @ weight)
    return [f"project_add {case}: off by {worst}"] * (not worst < 1)


def check_together(case, company=(2, 7, 17, 33, 64)) -> list[str]:
    """Compare rows among others with the same row alone, bit for bit."""
    case = (max(company), *case[1:])
    x, norm, weight, q_norm, k_norm, angles = inputs(case)
    stream = draw(np.random.default_rng(1), len(x), weight.shape[1])

    def run(rows):
        # The row that was alone comes last.
        order = np.roll(np.arange(rows), -1)
        few = x[order], norm, weight, q_norm, k_norm, angles[order]
        gated = project_triton.project_gated_triton(
            *(short(x[order])[:, None], short(weight)), norm=short(norm), eps=EPS
        )
        added = add_of(case, x[order], weight, stream[order])
        found = (*heads_of(case, few), gated, added)
        return [np.asarray(out.astype("float32"))[-1] for out in found]

    alone = run(1)
    return [
        f"{name}: other bits among {rows} tokens"
        for rows in company
        for name, a, b in zip("qkvga", alone, run(rows), strict=True)
        if not np.array_equal(a, b)
    ]


def test_bad_arguments_are_named(monkeypatch):
    x, norm, weight = jnp.ones((1, 1, 64)), jnp.ones(64), jnp.ones((64, 128))
    half = jnp.ones((1, 1, 16))
    heads = dict(num_heads=2, num_kv_heads=1, eps=EPS)

    def calls(**how):
        return (
            lambda: block.read_heads(
                x, None, norm, weight, None, None, half, half, **heads, **how
            ),
            lambda: block.read_gated(x, None, norm, weight, eps=EPS, **how),
            lambda: block.add_product(x, x, weight[:, :64], **how),
        )

    for call in calls(implementation="magic"):
        with pytest.raises(ValueError, match="unknown implementation='magic'"):
            call()
    for call in calls(implementation="fused"):
        with pytest.raises(NotImplementedError, match='"fused" needs an NVIDIA GPU'):
            call()
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    for call in calls(implementation="fused"):
        with pytest.raises(NotImplementedError, match="takes bfloat16, got float32"):
            call()
        with (
            jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",))),
            pytest.raises(NotImplementedError, match="runs on one device, but a mesh"),
        ):
            call()
    with pytest.raises(NotImplementedError, match='no activation="gelu_tanh"'):
        block.read_gated(
            *(x, None, norm, weight),
            eps=EPS,
            activation="gelu_tanh",
            implementation="fused",
        )


def test_heads_of_a_size_that_no_block_has_are_refused():
    x, weight = jax.ShapeDtypeStruct((1, 1, 64), "bfloat16"), of_matrix(64, 192)
    assert not block_triton.unsupported(x, weight, half=32)
    assert "takes heads of 32, 64" in block_triton.unsupported(x, weight, half=48)
    assert "multiples of 64" in block_triton.unsupported(x, of_matrix(64, 96))


def of_matrix(*shape):
    return jax.ShapeDtypeStruct(shape, "bfloat16")


SHAPES = [  # depth, query heads, KV heads, head size, columns of the feed-forward
    (4096, 32, 8, 128, 12288),
    (2048, 16, 8, 128, 6144),
    (576, 9, 3, 64, 1536),
]


def launches(rows, depth, heads, kv_heads, size, inner):
    """Yield kernels of a layer with dtypes, constants and tiles."""
    from jaxkv.kernels import block_triton_body, project_triton_body

    columns, half = (heads + 2 * kv_heads) * size, size // 2
    tiles = choose_tiles(rows, depth, columns, pairs=half)
    constants = block_triton.heads_constants(
        *(rows, depth, heads, kv_heads, half, EPS, tiles), head_norm=True
    )
    yield block_triton_body.project_heads, constants, tiles
    for length in (heads * size, inner):
        tiles = choose_tiles(rows, length, depth)
        constants = project_triton.constants(rows, length, depth, tiles)
        yield block_triton_body.project_add, constants, tiles
    tiles = project_triton.choose_tiles(rows, depth, inner, gated=True)
    constants = project_triton.constants(rows, depth, inner, tiles, gated=True, eps=EPS)
    yield project_triton_body.project_gated, constants, tiles


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: str(s[0]))
@pytest.mark.parametrize("rows", [1, pytest.param(64, marks=pytest.mark.slow)])
def test_layers_compile_without_spills(rows, shape):
    pytest.importorskip("triton")
    floats = ("cos_ptr", "sin_ptr", "parts_ptr", "squares_ptr")
    for kernel, constants, tiles in launches(rows, *shape):
        dtypes = dict.fromkeys(kernel.arg_names, "bfloat16")
        dtypes |= dict.fromkeys(floats, "float32") | dict(arrivals_ptr="int32")
        usage = triton_on_cpu.usage(kernel, dtypes, constants, tiles, 90)
        print(kernel.__name__, tiles, usage)
        assert usage["stack"] == 0 and usage["local"] == 0, (kernel, usage)
        assert usage["shared"] <= 227 * 1024


def test_the_order_of_a_sum_is_chosen_from_the_matrix_alone():
    for depth, columns, pairs in [(576, 960, 32), (576, 576, 0), (4096, 6144, 64)]:
        alone = choose_tiles(1, depth, columns, pairs=pairs)
        assert depth % (alone.parts * alone.depth) == columns % alone.block == 0
        for rows in range(2, 65):
            tiles = choose_tiles(rows, depth, columns, pairs=pairs)
            assert dataclasses.replace(tiles, stages=alone.stages) == alone


@pytest.mark.gpu
@pytest.mark.parametrize("case", [FAST[2], (1, 4096, 32, 8, 128, True, 4)])
def test_on_a_gpu_a_row_has_the_bits_that_it_has_alone(case):
    failures = check_heads(case) + check_gated(case) + check_add(case)
    failures += check_together(case)
    assert not failures, "\n".join(failures)


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_float64(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


def check_network() -> list[str]:
    """Compare the logits of a small network, fused and not."""
    config = Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        qk_norm=True,
    )
    params = random_parameters(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 1 else x, params)
    dispatch.triton_unavailable = lambda: ""

    def attend(q, k, v, state, weighing):
        return jnp.repeat(v, 2, axis=2) + q * k.mean(axis=2, keepdims=True), state

    def logits(implementation, rows):
        network = Decoder(config, implementation=implementation)
        tokens = jnp.arange(rows)[:, None]
        hidden, _ = network.apply({"params": params}, tokens, tokens, (0, 0), attend)
        out = network.apply({"params": params}, hidden, method="unembed")
        return np.asarray(out, np.float64)

    want, got = logits("xla", 3), logits("fused", 3)
    worst = np.abs(got - want).max() / np.abs(want).max() / (8 * TOLERANCE)
    failures = [f"network: off by {worst}"] * (not worst < 1)
    if not np.array_equal(got[:1], logits("fused", 1)):
        failures.append("network: other bits among 3 tokens")
    return failures


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    failures = []
    for case in {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]:
        failures += check_heads(case) + check_gated(case) + check_add(case)
    if sys.argv[1] == "SLOW":
        failures += check_network() + check_together(FAST[2])
    print(json.dumps(failures))
