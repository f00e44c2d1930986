"""Products of few tokens: against float64, and the Triton kernels interpreted.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import dataclasses
import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import dispatch, project, project_triton, triton_call
from jaxkv.kernels.pointwise import join
from jaxkv.kernels.project_triton import Tiles, choose_tiles, constants

# batch, tokens, depth, columns, dtype, parts, depth of a tile
FAST = [
    (1, 1, 128, 64, "bfloat16", 1, 64),
    (3, 1, 256, 128, "float16", 2, 64),
    (1, 17, 512, 64, "bfloat16", 4, 128),
]
# tokens of a batch whose products are to have the bits that they have alone
TOGETHER = [1, 2, 7, 8, 33, 64]
SLOW = [
    (*rows, *sizes, dtype, parts, 64)
    for rows, sizes, dtype, parts in itertools.product(
        [(1, 1), (2, 4), (16, 1), (32, 1)],
        [(256, 64), (768, 192)],
        ["bfloat16", "float16"],
        [1, 2, 4],
    )
]
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-8, "float16": 2**-11}
# rows, depth, columns, gated: the products of Qwen3-1.7B and 8B, and of needle
SHIPPED = [
    (1, 4096, 6144, False),
    (64, 12288, 4096, False),
    (8, 2048, 2048, False),
    (64, 2048, 6144, True),
    (1, 4096, 12288, True),
    (16, 384, 1024, True),
]


def inputs(case, columns, seed=0):
    """Return tokens and weights in float64, both exact in the dtype."""
    batch, tokens, depth, _, dtype, *_ = case
    rng = np.random.default_rng(seed)
    draws = (
        rng.standard_normal((batch, tokens, depth)),
        rng.standard_normal((depth, columns)),
    )
    return [
        np.asarray(jnp.asarray(x, dtype).astype(jnp.float32), np.float64) for x in draws
    ]


def gated_oracle(x, weight):
    gate, up = np.split(x @ weight, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def off(got, want, dtype) -> float:
    """Return the largest error, in tolerances of the largest number."""
    error = np.abs(np.asarray(got, np.float64) - want).max()
    return float(error / np.abs(want).max() / TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("tokens", [(1, 1), (2, 1), (1, 3)])
def test_products_against_float64(backend, tokens, dtype, monkeypatch):
    monkeypatch.setattr(project.jax, "default_backend", lambda: backend)
    case = (*tokens, 24, 10, dtype)
    x, weight = inputs(case, 10)
    arrays = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
    parts = project.project(*arrays, implementation="xla")
    assert parts.dtype == dtype and parts.shape == (1, *tokens, 10)
    assert off(join(parts, dtype).astype("float32"), x @ weight, dtype) < 1
    out = project.project_gated(*arrays, implementation="xla")
    assert out.dtype == dtype and out.shape == (*tokens, 5)
    # Gate and what it gates are rounded before they meet.
    assert off(out.astype("float32"), gated_oracle(x, weight), dtype) < 3


def test_another_activation_against_float64(monkeypatch):
    x, weight = inputs((2, 3, 24, 10, "float32"), 10)
    arrays = jnp.asarray(x, "float32"), jnp.asarray(weight, "float32")
    out = project.project_gated(*arrays, activation="gelu_tanh")
    gate, up = np.split(x @ weight, 2, axis=-1)
    inner = np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))
    assert off(out, gate * (1 + inner) / 2 * up, "float32") < 3
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    with pytest.raises(NotImplementedError, match='computes no activation="gelu_tanh"'):
        project.project_gated(*arrays, activation="gelu_tanh", implementation="triton")


@pytest.mark.parametrize("tied", [True, False])
def test_logits_against_float64(tied):
    x, weight = inputs((2, 3, 24, 0, "float32"), 10)
    given = jnp.asarray(weight.T if tied else weight, "float32")
    out = project.unembed(jnp.asarray(x, "float32"), given, tied=tied)
    assert off(out, x @ weight, "float32") < 1


def test_no_tokens_have_no_products():
    x, weight = jnp.ones((0, 1, 8)), jnp.ones((8, 4))
    assert project.project(x, weight).shape == (1, 0, 1, 4)
    assert project.project_gated(x, weight).shape == (0, 1, 2)
    assert project.unembed(x, weight, tied=False).shape == (0, 1, 4)


def test_parts_are_rounded_once():
    parts = jnp.asarray([1.0, 2.0**-9, 2.0**-9, 2.0**-9])[:, None, None, None]
    assert join(parts, jnp.bfloat16).item() == 1 + 2.0**-7
    assert join(parts[:1].astype(jnp.bfloat16), jnp.bfloat16).item() == 1


def test_bad_arguments_are_named():
    x, weight = jnp.ones((1, 1, 64)), jnp.ones((64, 128))
    with pytest.raises(ValueError, match=r"project: unknown implementation='magic'"):
        project.project(x, weight, implementation="magic")
    with pytest.raises(NotImplementedError, match="needs an NVIDIA GPU"):
        project.project_gated(x, weight, implementation="triton")
    with pytest.raises(ValueError, match=r"weight must be Float\[D F\] with D=64, got"):
        project.project(x, weight.T)
    with pytest.raises(ValueError, match="gate beside up, but has 5 columns"):
        project.project_gated(x, jnp.ones((64, 5)))
    for tied, other in ((True, weight), (False, weight.T)):
        with pytest.raises(ValueError, match=r"weight must be \[.* with D=64, got \["):
            project.unembed(x, other, tied=tied)


def test_what_a_named_kernel_cannot_take_is_an_error(monkeypatch):
    monkeypatch.setattr(dispatch, "triton_unavailable", lambda: "")
    x, weight = jnp.ones((1, 1, 64)), jnp.ones((64, 128))
    for product in (project.project, project.project_gated):
        with pytest.raises(NotImplementedError, match="takes one 16-bit float"):
            product(x, weight, implementation="triton")
        product(x, weight)


@pytest.mark.parametrize(
    ("rows", "sizes", "dtypes", "gated", "why"),
    [
        (65, (64, 64), ("bfloat16", "bfloat16"), False, "1 to 64 tokens, got 65"),
        (0, (64, 64), ("bfloat16", "bfloat16"), False, "1 to 64 tokens, got 0"),
        (1, (64, 64), ("float32", "float32"), False, "16-bit float, got float32"),
        (1, (64, 64), ("int16", "int16"), False, "16-bit float, got int16"),
        (1, (64, 0), ("bfloat16", "bfloat16"), False, "multiples of 64, got 64 x 0"),
        (1, (64, 64), ("bfloat16", "float16"), False, "bfloat16 and float16"),
        (1, (96, 64), ("bfloat16", "bfloat16"), False, "multiples of 64, got 96 x 64"),
        (1, (64, 192), ("bfloat16", "bfloat16"), True, "multiples of 64, got 64 x 96"),
        (64, (64, 128), ("float16", "float16"), True, ""),
    ],
)
def test_what_the_kernels_cannot_take_is_said(rows, sizes, dtypes, gated, why):
    x = jax.ShapeDtypeStruct((rows, 1, sizes[0]), dtypes[0])
    weight = jax.ShapeDtypeStruct(sizes, dtypes[1])
    reason = project_triton.unsupported(x, weight, gated=gated)
    assert why in reason and bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("depth", "columns", "why"),
    [
        (64, 50264, ""),
        (64, 50257, "takes multiples of 64 x 8, got 64 x 50257"),
        (96, 64, "takes multiples of 64 x 8, got 96 x 64"),
    ],
)
def test_what_output_layers_the_kernel_cannot_take_is_said(depth, columns, why):
    x = jax.ShapeDtypeStruct((1, 1, depth), "bfloat16")
    for sizes in ((depth, columns), (columns, depth)):
        weight = jax.ShapeDtypeStruct(sizes, "bfloat16")
        reason = project_triton.unsupported(x, weight, vocabulary=True)
        assert why in reason and bool(why) == bool(reason)


@pytest.mark.parametrize("gated", [True, False])
def test_the_order_of_a_sum_is_chosen_from_the_matrix_alone(gated):
    for depth, columns in [(576, 960), (4096, 4096), (11008, 28672)]:
        alone = choose_tiles(1, depth, columns, gated=gated)
        for rows in range(2, 65):
            tiles = choose_tiles(rows, depth, columns, gated=gated)
            assert dataclasses.replace(tiles, stages=alone.stages) == alone
            sizes = constants(rows, depth, columns, tiles, gated=gated)
            # 64 rows at a time would be another instruction.
            assert sizes["ROW_TILE"] in (16, 32)
            assert sizes["ROW_TILE"] * sizes["ROW_TILES"] >= rows


def test_chosen_tiles_are_possible_everywhere():
    for rows, depth, columns, gated, shared in itertools.product(
        *([1, 17, 64], [64, 192, 384, 11008], [64, 1024, 28672]),
        *([True, False], [99 * 1024, 163 * 1024, 227 * 1024]),
    ):
        tiles = choose_tiles(rows, depth, columns, gated=gated, shared=shared)
        assert depth % (tiles.parts * tiles.depth) == 0
        assert columns % tiles.block == 0
        assert tiles.parts == 1 or not gated
        tile = 2 * tiles.depth * (64 * (1 + gated) + project_triton.padded(rows))
        assert tile * tiles.stages <= shared


def test_narrow_products_are_shared_out():
    assert [choose_tiles(1, 4096, f).parts for f in (2048, 4096, 6144)] == [4, 4, 2]
    assert choose_tiles(1, 128, 2048).parts == 2  # no part without a tile


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_float64(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", SHIPPED, ids=lambda s: "-".join(map(str, s)))
def test_shipped_tiles_compile_without_spills(shape, capability, record_property):
    pytest.importorskip("triton")
    from jaxkv.kernels import project_triton_body as body

    rows, depth, columns, gated = shape
    shared = 1024 * (163 if capability == 80 else 227)
    tiles = choose_tiles(rows, depth, columns, gated=gated, shared=shared)
    kernel = body.project_gated if gated else body.project_part
    dtypes = dict.fromkeys(("x_ptr", "norm_ptr", "weight_ptr"), "bfloat16")
    usage = triton_on_cpu.usage(
        kernel,
        dtypes | dict(out_ptr="bfloat16" if gated else "float32"),
        constants(rows, depth, columns, tiles, gated=gated),
        tiles,
        capability,
    )
    for name, number in usage.items():
        record_property(name, number)
    print(f"sm_{capability} {shape} {tiles} {usage}")
    assert usage["stack"] == 0 and usage["local"] == 0
    assert usage["shared"] <= shared


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_triton_on_a_gpu_agrees_with_float64(rows):
    case = (rows, 1, 2048, 1024, "bfloat16")
    x, weight = inputs(case, 1024)
    arrays = jnp.asarray(x, "bfloat16"), jnp.asarray(weight, "bfloat16")
    parts = project.project(*arrays, implementation="triton")
    assert parts.dtype == "float32" and len(parts) > 1
    assert off(join(parts, "float32"), x @ weight, "float32") < 1
    out = project.project_gated(*arrays, implementation="triton")
    assert off(out.astype("float32"), gated_oracle(x, weight), "bfloat16") < 1
    again = project.project(*arrays, implementation="triton")
    np.testing.assert_array_equal(parts, again)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(576, 1152), (2048, 4096), (4096, 12288)])
def test_on_a_gpu_a_token_has_the_products_that_it_has_alone(sizes):
    failures = check_together(*sizes)
    assert not failures, "\n".join(failures)


def check_together(depth, columns) -> list[str]:
    """Compare products of batches with those of their tokens alone, bit for bit."""
    x, weight = inputs((max(TOGETHER), 1, depth, 0, "bfloat16"), columns)
    x, weight = jnp.asarray(x, "bfloat16"), jnp.asarray(weight, "bfloat16")
    products = {
        "project": project_triton.project_triton,
        "project_gated": project_triton.project_gated_triton,
        "unembed": functools.partial(project_triton.unembed_triton, tied=False),
        "tied unembed": lambda x, weight: project_triton.unembed_triton(
            x, weight.T, tied=True
        ),
    }
    failures = []
    for name, product in products.items():

        def times(x, product=product):
            out = np.asarray(product(x, weight).astype("float32"))
            return out.reshape(-1, len(x), out.shape[-1])

        alone = times(x[:1])
        for rows in TOGETHER:
            # The token that was alone comes last.
            out = times(jnp.roll(x[:rows], -1, axis=0))
            if not np.array_equal(out[:, -1], alone[:, 0]):
                failures.append(f"{name}: other bits among {rows} tokens")
    return failures


def check_unembed(case) -> list[str]:
    """Run the output layer under the interpreter and return what is wrong with it."""
    batch, tokens, _, columns, dtype, _, tile_depth = case
    columns += 8  # the last block is not full
    tiles = Tiles(parts=1, block=64, depth=tile_depth, warps=2, stages=2)
    x, weight = inputs(case, columns)
    failures = []
    for tied in (True, False):
        given = weight.T if tied else weight
        got = project_triton.unembed_triton(
            jnp.asarray(x, dtype), jnp.asarray(given, dtype), tied=tied, tiles=tiles
        )
        assert got.dtype == dtype and got.shape == (batch, tokens, columns)
        worst = off(got.astype("float32"), x @ weight, dtype) / 2
        if not worst < 1:
            failures.append(f"unembed {case} {tied=}: off by {worst}")
    return failures


def check_interpreted(case) -> list[str]:
    """Run both kernels under the interpreter and return what is wrong with them."""
    *_, columns, dtype, parts, tile_depth = case
    tiles = Tiles(parts=parts, block=64, depth=tile_depth, warps=2, stages=2)
    x, weight = inputs(case, columns)
    arrays = jnp.asarray(x, dtype), jnp.asarray(weight, dtype)
    got = project_triton.project_triton(*arrays, tiles=tiles)
    assert got.dtype == "float32" and len(got) == parts
    failures = []
    worst = off(got.sum(0), x @ weight, "float32")
    if not worst < 1:
        failures.append(f"project {case}: off by {worst}")
    share = x.shape[-1] // parts
    first = off(got[0], x[..., :share] @ weight[:share], "float32")
    if not first < 1:
        failures.append(f"project {case}: the first part is off by {first}")
    x, weight = inputs(case, 2 * columns, seed=1)
    arrays = jnp.asarray(x, dtype), jnp.asarray(weight / 8, dtype)
    got = project_triton.project_gated_triton(*arrays, tiles=tiles)
    # Triton's interpreter truncates to bfloat16.
    worst = off(got.astype("float32"), gated_oracle(x, weight / 8), dtype) / 2
    if not worst < 1:
        failures.append(f"project_gated {case}: off by {worst}")
    return failures


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = [f for case in cases for f in check_interpreted(case)]
    failures += [f for case in cases for f in check_unembed(case)]
    if sys.argv[1] == "FAST":
        failures += check_together(512, 128)
    print(json.dumps(failures))
