"""Shared slots in Triton: interpreted, compiled without a GPU, and on one.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import functools
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu
from packed import packed
from shared_slots_cases import ABOUT, TOLERANCE, make_inputs, make_tree

from jaxkv.kernels import decode_triton, shared_slots, shared_triton, triton_call
from jaxkv.kernels.shared_triton import Sizes, Tiles, choose_tiles

TILES = Tiles(rows=16, splits=2, block=16, warps=4, stages=2)
OWN = decode_triton.Tiles(splits=3, block=16, warps=4, stages=3)
# what makes the arrays, heads, KV heads, documents, dtype, head size, tiles
FAST = [
    (make_inputs, 4, 2, "three", "float32", 16, TILES, OWN),
]
SLOW = [
    (make_tree, 3, 1, "one document", "float16", 24, TILES, None),
    (make_inputs, 3, 1, "one document", "bfloat16", 16, None, None),
    (make_tree, 4, 2, "three", "float32", 16, TILES, None),
    (make_tree, 4, 2, "three", "float32", 16, TILES, None, True),
    (make_tree, 3, 1, "one document", "float16", 24, TILES, None, True),
]
# rows, nodes, heads, KV heads, documents, most, slots, head size: as shipped
SHIPPED = [(64, 1, 16, 8, 1, 64, 16384, 128), (64, 1, 9, 3, 1, 64, 4096, 64)]
MORE = [(1, 1, 8, 4, 1, 1, 4096, 256), (64, 32, 16, 8, 1, 64, 4096, 128)]


def run(inputs, tiles=None, own_tiles=None, **weighing):
    """Return the output of the rows that go on, and the slots of a token."""
    given = packed(inputs)
    owner = inputs["shared"].owner
    most = int(np.bincount(np.asarray(owner)).max())
    rows, _ = shared_slots.places(owner, len(inputs["shared"].keys), most)
    how = dict(scale=0.3, tiles=tiles, own_tiles=own_tiles) | weighing
    if inputs["query"].ndim == 3:
        return shared_triton.attend_from_token_triton(**given, rows=rows, **how)
    return shared_triton.attend_from_tree_triton(**given, rows=rows, **how), None


def check(
    make, heads, kv_heads, about, dtype, head_dim, tiles, own_tiles, weighs=False
) -> list[str]:
    """Compare outputs and slots with the reference's; `weighs` adds a sink."""
    case = f"{make.__name__} {heads}/{kv_heads} {about} {dtype} {head_dim}"
    options = dict(dtype=dtype, head_dim=head_dim)
    inputs = make(heads, kv_heads, ABOUT[about], **options)
    operation = (
        shared_slots.attend_from_token
        if make is make_inputs
        else shared_slots.attend_from_tree
    )
    how = dict(scale=0.3, most=4, implementation="reference")
    weighing = dict(sink=jnp.linspace(-1, 3, heads), cap=0.7) if weighs else {}
    want = functools.partial(operation, **how, **weighing)
    want = jax.jit(want)(**packed(inputs))
    got, slots = run(inputs, tiles, own_tiles, **weighing)
    failures = []
    if slots is not None:
        want, wanted = want
        for name, one, two in zip(slots._fields[:4], slots, wanted, strict=False):
            if not np.array_equal(
                *(np.asarray(x, np.float32) for x in (one, two)), equal_nan=True
            ):
                failures.append(f"{case}: other {name}")
    real = np.asarray(inputs["position"]) >= 0
    got, want = (np.asarray(x, np.float32)[real] for x in (got, want))
    if not np.allclose(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]):
        failures.append(f"{case}: off by {np.abs(got - want).max()}")
    return failures


def check_bits(size=16) -> list[str]:
    """Compare rows with the same rows alone and apart, bit for bit."""
    inputs = make_inputs(4, 2, ABOUT["three"], dtype="bfloat16", head_dim=size)
    whole = np.asarray(run(inputs)[0], np.float32)
    own = {name: x for name, x in inputs.items() if name != "shared"}
    failures = []
    for rows in ([0], [3, 0], [2, 1]):
        shared = inputs["shared"]
        some = {name: x[np.array(rows)] for name, x in own.items()}
        some["shared"] = shared._replace(owner=shared.owner[np.array(rows)])
        if not np.array_equal(np.asarray(run(some)[0], np.float32), whole[rows]):
            failures.append(f"other bits for rows {rows}")
    return failures


@triton_on_cpu.fast_and_slow
def test_interpreted(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


def test_how_a_token_is_shared_out_does_not_depend_on_others():
    for kv_heads, *rest in [(8, 16384, 128), (3, 100, 64), (1, 4096, 256)]:

        def tiles(*sizes, kv_heads=kv_heads, rest=rest):
            batch, nodes, documents, most = sizes
            heads = 3 * kv_heads, kv_heads
            whole = Sizes(batch, nodes, *heads, documents, most, *rest)
            return choose_tiles(whole, "bfloat16")

        alone = tiles(1, 1, 1, 1)
        for batch, nodes in itertools.product([1, 4, 64], [1, 5, 16]):
            if batch * nodes <= 64:
                assert tiles(batch, nodes, 1, batch) == alone
                assert tiles(batch, nodes, batch, 1) == alone
        assert tiles(64, 32, 1, 64).splits <= alone.splits


@triton_on_cpu.compiled_for(SHIPPED, MORE)
def test_shipped_tiles_compile_without_spills(shape, capability):
    pytest.importorskip("triton")
    from jaxkv.kernels import shared_triton_body as body

    sizes = Sizes(*shape)
    tiles = choose_tiles(sizes, "bfloat16")
    constants = shared_triton.attend_constants(sizes, "bfloat16", 0.1, tiles)
    dtypes = dict.fromkeys(body.attend_documents.arg_names, "bfloat16")
    dtypes |= dict.fromkeys(("positions_ptr", "rows_ptr"), "int32")
    dtypes |= dict.fromkeys(("out_ptr", "statistic_ptr"), "float32")
    usage = triton_on_cpu.usage(
        *(body.attend_documents, dtypes, constants, tiles, capability)
    )
    print(f"sm_{capability} {shape} {tiles} {usage}")
    assert usage["stack"] == 0 and usage["local"] == 0
    assert usage["shared"] <= 99 * 1024


@pytest.mark.gpu
def test_on_a_gpu():
    failures = check_bits(64)
    for make, heads, kv_heads, about, dtype, head_dim, *_ in [*FAST, *SLOW]:
        failures += check(make, heads, kv_heads, about, dtype, head_dim, None, None)
    assert not failures, "\n".join(failures)


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    failures = check_bits() if sys.argv[1] == "SLOW" else []
    for case in dict(FAST=FAST, SLOW=SLOW)[sys.argv[1]]:
        failures += check(*case)
    print(json.dumps(failures))
