"""LongFlow along the paths of a tree in Triton, without a GPU: against the reference.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import itertools
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu
from longflow_tree_cases import (
    FAST,
    MUTATIONS,
    SLOW,
    faults,
    make_case,
    make_tree,
    options_of,
)

from jaxkv.kernels import longflow_tree_triton, triton_call
from jaxkv.kernels.longflow_tree_triton import (
    Tiles,
    ancestors_by_depth,
    attend_constants,
    choose_tiles,
    list_constants,
    path_constants,
)

# batch, nodes, depth, head size, dtype of 32 heads, 8 KV heads, 3200 slots
SHIPPED = [(1, 16, 10, 128, "bfloat16")]
SHIPPED_SLOW = [
    *itertools.product([1, 8], [16, 64], [10], [64, 128, 256], ["bfloat16"]),
    *[(1, 64, 63, 128, "bfloat16"), (8, 16, 10, 128, "float32")],
]


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_reference(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@pytest.mark.parametrize(
    "shape",
    [*SHIPPED, *(pytest.param(s, marks=pytest.mark.slow) for s in SHIPPED_SLOW)],
    ids=lambda shape: "-".join(map(str, shape)),
)
@pytest.mark.parametrize("weighs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_shipped_tiles_compile_without_spills(shape, weighs, record_property):
    pytest.importorskip("triton")
    batch, nodes, depth, head_dim, dtype = shape
    sizes = (batch, nodes, 32, head_dim), of(batch, 8, 3200, head_dim, dtype=dtype)
    tiles = choose_tiles(
        batch, 32, 8, nodes, 3200, head_dim, dtype, depth=depth, shared=True
    )
    others = *sizes, depth, 0, True, tiles
    for kernel, constants, launch in (
        ("attend_tree", attend_constants(*sizes, 0.1, "l1", tiles), tiles),
        ("list_least", list_constants(*others), LATER),
        ("finish_paths", path_constants(*others), LATER),
    ):
        used = compile_usage(kernel, dtype, constants, weighs, launch)
        for name, number in used.items():
            record_property(f"{kernel} {name}", number)
        print(f"sm_90 {shape} {kernel} {launch} {used}")
        # Of a path of 64, a few registers do not fit; nobody drafts so long ones.
        assert used["stack"] <= (32 if depth == 63 else 0) and used["local"] == 0
        assert used["shared"] <= 160 * 1024


LATER = SimpleNamespace(warps=8, stages=1)


def of(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


def compile_usage(name, dtype, constants, weighs, launch):
    """Compile one kernel to machine code and read what it uses, without a GPU."""
    from jaxkv.kernels import longflow_finish_body, longflow_tree_triton_body

    module = {"finish_paths": longflow_finish_body}.get(name, longflow_tree_triton_body)
    kernel = getattr(module, name)
    dtypes = dict.fromkeys(kernel.arg_names, "int32")
    arrays = "query key value keys values out sink"
    dtypes |= {f"{array}_ptr": dtype for array in arrays.split()}
    floats = "parts statistic logits norms new_norms whole"
    dtypes |= {f"{array}_ptr": "float32" for array in floats.split()}
    weighing = triton_call.weighing(1, 30.0) if weighs else triton_on_cpu.PLAIN
    constants |= {k: x for k, x in weighing.items() if k in kernel.arg_names}
    return triton_on_cpu.usage(kernel, dtypes, constants, launch, 90)


def test_chosen_tiles_are_possible_everywhere():
    for batch, (heads, kv_heads), nodes, slots, shared, depth in itertools.product(
        *([1, 7, 300], [(1, 1), (32, 8), (48, 3), (128, 8)], [1, 16, 64]),
        *([1, 17, 3201], [True, False], [0, 10, 63]),
    ):
        tiles = choose_tiles(
            *(batch, heads, kv_heads, nodes, slots, 128, "bfloat16"),
            **dict(depth=depth, shared=shared),
        )
        assert tiles.chunk % 32 == 0 and 1 <= tiles.listed <= tiles.chunk
        assert (kv_heads if shared else 1) % tiles.heads == 0
        # No list is too short for its part of what a path overwrites.
        chunks = -(-slots // tiles.chunk)
        assert chunks * tiles.listed >= min(slots, depth + 1)


def test_paths_hold_the_ancestor_of_each_depth():
    rng = np.random.default_rng(0)
    parents, depths = make_tree(rng, 3, 20, 6)
    paths = np.asarray(ancestors_by_depth(*map(jnp.asarray, (parents, depths)), 6))
    for b, t in itertools.product(range(3), range(20)):
        node = t
        for depth in range(6, -1, -1):
            if depth > depths[b, t]:
                assert paths[b, t, depth] == -1
                continue
            assert paths[b, t, depth] == node
            node = parents[b, node]


def check(case, seed, mutate=lambda arrays: arrays) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it."""
    arrays = make_case(case, seed)
    tiles = Tiles(
        **dict(rows=16, splits=case.splits, block=16, warps=4, stages=3),
        **dict(apart=case.apart and case.splits > 1, chunk=32, heads=1),
        listed=case.listed,
    )
    got = longflow_tree_triton.longflow_tree_triton(
        **mutate(arrays),
        **options_of(case, depth=int(arrays["depths"].max())),
        tiles=tiles,
    )
    return faults(case, arrays, got)


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = [f for seed, case in enumerate(cases) for f in check(case, seed)]
    if sys.argv[1] == "SLOW":
        for name, mutate in MUTATIONS.items():
            if not check(SLOW[-2], 0, mutate):
                failures.append(f"{name}: a change went unnoticed")
    print(json.dumps(failures))
