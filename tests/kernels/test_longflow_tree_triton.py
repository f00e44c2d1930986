"""LongFlow along the paths of a tree in Triton, without a GPU: against the reference.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import itertools
import json
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import longflow_tree, longflow_tree_triton, triton_call
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.longflow_tree_triton import (
    Tiles,
    ancestors_by_depth,
    attend_constants,
    choose_tiles,
    list_constants,
    path_constants,
)
from jaxkv.kernels.scores import value_norms


class Case(NamedTuple):
    """A tree, a cache, options, and tiles; `listed` says how much is left to chance."""

    nodes: int
    heads: int
    kv_heads: int
    slots: int
    head_dim: int
    dtype: str = "float32"
    score: str = "l1"
    shared: bool = True
    n_recent: int = 0
    splits: int = 2
    apart: bool = True
    listed: int = 8
    sink: bool = False
    cap: float | None = None


FAST = [
    # So few slots that paths overwrite all of them, and their own.
    Case(4, 2, 1, 3, 32, splits=1, apart=False, listed=2, sink=True, cap=2.0),
    Case(3, 2, 2, 37, 32, "bfloat16", "l2", shared=False, n_recent=1),
]
SLOW = [
    Case(
        *(nodes, kv_heads * group, kv_heads, slots, head_dim, dtype, score, shared),
        **dict(n_recent=recent, splits=splits, listed=listed, sink=sink, cap=cap),
    )
    for (kv_heads, group), slots, (head_dim, dtype, score), shared, rest in (
        itertools.product(
            [(2, 4)],
            [5, 130],
            [
                (64, "float32", "l1"),
                (96, "float16", "l2"),
                (128, "bfloat16", "l1"),
            ],
            [True, False],
            [(7, 0, 1, 4, False, None), (9, 2, 3, 8, True, 3.0)],
        )
    )
    for nodes, recent, splits, listed, sink, cap in [rest]
]
SLOW += [
    Case(5, 4, 2, 37, 32),
    # Lists of one, which say next to nothing.
    Case(4, 3, 1, 45, 48, score="attention", listed=1),
]
# As in test_decode_triton.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6, "float16": 2**-10}

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


def make_tree(rng, batch, nodes, depth):
    """Return parents and depths of one tree per row."""
    parents, depths = np.zeros((2, batch, nodes), np.int32)
    for row, node in itertools.product(range(batch), range(1, nodes)):
        above = np.flatnonzero(depths[row, :node] < depth)
        parent = above[-1] if rng.random() < 0.7 else rng.choice(above)
        parents[row, node], depths[row, node] = parent, depths[row, parent] + 1
    return parents, depths


def make_case(case, seed):
    """Return the arguments of the op by name; free slots hold NaN.

    The first row is full and protects some slots, the second has free ones or is empty,
    the third is finished.
    """
    rng = np.random.default_rng(seed)
    batch, kv_heads, slots = 3, case.kv_heads, case.slots

    def normal(*sizes):
        return rng.standard_normal((batch, *sizes, case.head_dim), dtype=np.float32)

    parents, depths = make_tree(rng, batch, case.nodes, 6)
    free = rng.random((batch, 1 if case.shared else kv_heads, slots)) < 0.3
    free[0] = False
    free[1] |= seed % 4 == 3
    order = rng.permuted(np.broadcast_to(np.arange(slots), free.shape), axis=-1)
    held = np.broadcast_to(np.where(free, -1, order), (batch, kv_heads, slots))
    nan = np.where(held < 0, np.nan, 0)[..., None].astype(np.float32)
    values = normal(kv_heads, slots) + nan
    values *= np.exp(rng.standard_normal((*held.shape, 1)).astype(np.float32))
    target = rng.integers(0, slots, (batch, kv_heads))
    target[2] = rng.choice([-1, slots, 2**31 - 1])
    key, value = normal(case.nodes, kv_heads), normal(case.nodes, kv_heads)
    cache = normal(kv_heads, slots) + nan, values
    query, key, value, keys, values = (
        jnp.asarray(x, case.dtype)
        for x in (normal(case.nodes, case.heads), key, value, *cache)
    )
    position, oldest = [slots, slots, -1], [slots // 3, 0, 0]
    integers = held, target, position, oldest, parents, depths
    held, target, position, *rest = (jnp.asarray(x, jnp.int32) for x in integers)
    norms = value_norms(values, case.score)
    sink = jnp.linspace(-1, 3, case.heads).astype(case.dtype) if case.sink else None
    return dict(
        query=query,
        nodes=Nodes(key, value, position),
        slots=Slots(keys, values, held, target, norms),
        **dict(zip(("oldest", "parents", "depths"), rest, strict=True)),
        sink=sink,
    )


reference = jax.jit(
    longflow_tree._reference,
    static_argnames=("n_recent", "depth", "scale", "cap", "score", "shared", "axis"),
)


def check(case, seed, mutate=lambda arrays: arrays) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it."""
    arrays = make_case(case, seed)
    options = dict(
        n_recent=case.n_recent,
        depth=int(arrays["depths"].max()),
        scale=2 * case.head_dim**-0.5,
        cap=case.cap,
        score=case.score,
        shared=case.shared,
    )
    tiles = Tiles(
        **dict(rows=16, splits=case.splits, block=16, warps=4, stages=3),
        **dict(apart=case.apart and case.splits > 1, chunk=32, heads=1),
        listed=case.listed,
    )
    got = longflow_tree_triton.longflow_tree_triton(
        **mutate(arrays), **options, tiles=tiles
    )
    want = reference(**arrays, **options, axis=None)
    failures = []
    alive = np.asarray(arrays["nodes"].position) >= 0
    for name, mine, theirs in zip(want._fields[1:], got[1:], want[1:], strict=True):
        differ = (np.asarray(mine) != np.asarray(theirs))[alive].sum()
        if differ:
            failures.append(f"{case}: {differ} of {name} differ")
    out, wanted = (np.asarray(x[0].astype(jnp.float32)) for x in (got, want))
    error = np.abs(out - wanted)[alive].max() / max(1, np.abs(wanted[alive]).max())
    if not (error <= TOLERANCE[case.dtype] and np.isfinite(out).all()):
        failures.append(f"{case}: out is off by {error:.3g}")
    return failures


MUTATIONS = {
    "values": lambda x: x | dict(slots=roll(x["slots"], "values")),
    "norms": lambda x: x | dict(slots=roll(x["slots"], "norms")),
    "parents": lambda x: x | dict(parents=0 * x["parents"]),
    "oldest": lambda x: x | dict(oldest=x["oldest"] + 9),
    "values of nodes": lambda x: (
        x | dict(nodes=x["nodes"]._replace(value=jnp.roll(x["nodes"].value, 1, 1)))
    ),
}


def roll(slots, name):
    return slots._replace(**{name: jnp.roll(getattr(slots, name), 1, 2)})


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
