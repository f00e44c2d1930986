"""The Triton kernels of trees without a GPU: against the reference, and compiled.

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

from jaxkv.kernels import tree_attention, tree_triton, tree_write, triton_call
from jaxkv.kernels.cache import Nodes, Slots
from jaxkv.kernels.tree_triton import Tiles, attend_constants, choose_tiles

# nodes, heads, KV heads, slots, head size, dtype, kind of tree, rows, splits, block;
# a fourth number of tiles: whether nodes have a split of their own; then of some,
# whether there are sinks, and the cap
FAST = [
    (7, 4, 2, 37, 64, "float32", "random", 16, 2, 16),
    (5, 8, 2, 50, 64, "float32", "chain", 32, 1, 16),
    (1, 4, 2, 20, 64, "float32", "chain", 16, 1, 16),
    (16, 8, 2, 70, 128, "bfloat16", "random", 64, 3, 32),
    (9, 3, 1, 33, 96, "float16", "random", 16, 2, 32, True),
    (35, 2, 2, 48, 64, "float32", "random", 16, 3, 16, True),  # two words of ancestors
    (4, 16, 1, 40, 256, "bfloat16", "random", 64, 2, 16),
    (7, 4, 2, 37, 64, "float32", "random", 16, 2, 16, False, True, 1.5),
    (5, 6, 2, 40, 64, "float16", "chain", 32, 1, 16, False, True, None),
]
SLOW = [
    (nodes, kv_heads * group, kv_heads, slots, *rest, rows, splits, 32)
    for nodes, (kv_heads, group), slots, rest, rows, splits in itertools.product(
        [3, 16, 64],
        [(2, 1), (1, 7)],
        [5, 130],
        [(64, "float32", "random"), (96, "bfloat16", "chain")],
        [16, 64],
        [1, 3],
    )
]
REST = (None,) * 10 + (False, False, None)  # of a case that ends sooner
# As in test_decode_triton.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6, "float16": 2**-10}

# batch, nodes, head size, dtype of 32 heads, 8 KV heads, 3200 slots, tiles as shipped
SHIPPED = [
    (1, 16, 128, "bfloat16"),
    (1, 64, 128, "bfloat16"),
]
SHIPPED_SLOW = list(
    itertools.product([1, 16], [16, 64], [64, 96, 128, 256], ["bfloat16", "float32"])
)


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_reference(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@triton_on_cpu.compiled_for(SHIPPED, SHIPPED_SLOW)
def test_shipped_tiles_compile_without_spills(shape, capability, record_property):
    pytest.importorskip("triton")
    batch, nodes, head_dim, dtype = shape
    tiles = choose_tiles(batch, 32, 8, nodes, 3200, head_dim, dtype)
    constants = attend_constants(
        *((batch, nodes, 32, head_dim), (batch, 8, 12)),
        *(jax.ShapeDtypeStruct((batch, 8, 3200, head_dim), dtype), 0.1, tiles),
    )
    splits = tiles.splits > 1
    usage = compile_usage(
        "attend_tree_split", dtype, splits, constants, tiles, capability
    )
    for name, number in usage.items():
        record_property(name, number)
    print(f"sm_{capability} {shape} {tiles} {usage}")
    # With heads of 256 in float32, a few registers do not fit; it is not for speed.
    spared = 32 if (head_dim, dtype) == (256, "float32") else 0
    assert usage["stack"] <= spared and usage["local"] == 0
    assert usage["shared"] <= 99 * 1024  # what the smaller devices of Ampere have


def test_writing_compiles_without_spills():
    pytest.importorskip("triton")
    constants = tree_triton.write_constants(8, 64, 11, 3200, 128)
    tiles = Tiles(rows=16, splits=1, block=16, warps=4, stages=1)
    usage = compile_usage("write_path", "bfloat16", False, constants, tiles, 90)
    assert usage["stack"] == 0 and usage["local"] == 0


def compile_usage(kernel, dtype, writes_parts, constants, tiles, capability):
    """Compile one kernel to machine code and read what it uses, without a GPU."""
    from jaxkv.kernels import tree_triton_body

    kernel = getattr(tree_triton_body, kernel)
    dtypes = dict.fromkeys(kernel.arg_names, "int32")
    arrays = ("query", "key", "value", "keys", "values")
    dtypes |= {f"{name}_ptr": dtype for name in arrays}
    if kernel is tree_triton_body.attend_tree_split:
        constants |= triton_on_cpu.PLAIN
    dtypes["statistic_ptr"] = "float32"
    dtypes["out_ptr"] = "float32" if writes_parts else dtype
    return triton_on_cpu.usage(kernel, dtypes, constants, tiles, capability)


def test_chosen_tiles_are_possible_everywhere():
    for batch, (heads, kv_heads), nodes, slots, head_dim, dtype in itertools.product(
        *([1, 7, 300], [(1, 1), (32, 8), (48, 3)], [1, 5, 64], [1, 17, 3201]),
        *([64, 96, 128, 256], ["float32", "float16"]),
    ):
        tiles = choose_tiles(batch, heads, kv_heads, nodes, slots, head_dim, dtype)
        for size in (tiles.block, tiles.rows):
            assert size >= 16 and size & (size - 1) == 0
        # No split without a tile.
        assert 1 <= tiles.splits <= -(-slots // tiles.block)


def test_chosen_tiles_fill_the_device():
    for nodes, blocks in [(16, 1), (64, 2)]:
        tiles = choose_tiles(1, 32, 8, nodes, 3200, 128, "bfloat16")
        assert -(-4 * nodes // tiles.rows) == blocks
        assert 120 <= 8 * blocks * tiles.splits <= 132
    tiles = choose_tiles(1, 32, 8, 16, 3200, 128, "bfloat16", num_sms=64)
    assert tiles.splits == 8


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 64])
def test_packed_masks_hold_every_ancestor(nodes):
    mask = np.random.default_rng(nodes).random((2, nodes, nodes)) < 0.5
    words = np.asarray(tree_triton.pack(jnp.asarray(mask)))
    assert words.shape == (2, nodes, -(-nodes // 32)) and words.dtype == np.int32
    node = np.arange(nodes)
    np.testing.assert_array_equal(words[..., node // 32] >> (node % 32) & 1, mask)


def make_tree(rng, batch, nodes, depth, shape):
    """Return parents, depths and the mask of ancestors of one tree per row."""
    parents, depths = np.zeros((2, batch, nodes), np.int32)
    ancestors = np.zeros((batch, nodes, nodes), bool)
    for row, node in itertools.product(range(batch), range(nodes)):
        if node:
            above = np.flatnonzero(depths[row, :node] < depth)
            parent = above[-1] if shape == "chain" else rng.choice(above)
            parents[row, node], depths[row, node] = parent, depths[row, parent] + 1
            ancestors[row, node] = ancestors[row, parent]
        ancestors[row, node, node] = True
    return parents, depths, ancestors


def make_case(case, seed):
    """Return the arguments of `tree_attention`, and parents; free slots hold NaN."""
    nodes, heads, kv_heads, slots, head_dim, dtype, shape = case[:7]
    rng = np.random.default_rng(seed)
    batch, depth = 4, min(6, max(1, nodes - 1))
    parents, depths, ancestors = make_tree(rng, batch, nodes, depth, shape)

    def normal(*sizes):
        array = rng.standard_normal((batch, *sizes, head_dim), dtype=np.float32)
        return jnp.asarray(array, dtype)

    # Row 0 is full and overwritten by every path, row 1 is a prefix that grows, row 2
    # is sparse, and its paths come back to their own slots, row 3 is empty.
    occupied = rng.random((batch, kv_heads, slots)) < 0.5
    length = rng.integers(0, slots)
    occupied[0], occupied[1], occupied[3] = True, np.arange(slots) < length, False
    positions = np.where(occupied, rng.permutation(slots), -1).astype(np.int32)
    steps = np.arange(depth + 2)
    upcoming = rng.integers(0, slots, (batch, kv_heads, depth + 2)).astype(np.int32)
    upcoming[0] = (rng.integers(0, slots, (kv_heads, 1)) + steps) % slots
    upcoming[1] = length + steps  # beyond the end, too
    upcoming[2] = upcoming[2, :, steps % 3].T
    nan = jnp.asarray(np.where(occupied, 0, np.nan)[..., None], dtype)
    args = (
        *(normal(nodes, n) for n in (heads, kv_heads, kv_heads)),
        *(normal(kv_heads, slots) + nan, normal(kv_heads, slots) + nan),
        *map(jnp.asarray, (positions, upcoming, depths, ancestors)),
    )
    return args, parents


def packed(args):
    """Return the arguments of `tree_attention` as it takes them."""
    query, key, value, *cache, upcoming, depths, ancestors = args
    position = jnp.zeros(len(query), jnp.int32)  # nobody reads it, nor the target
    slots = Slots(*cache, upcoming[:, :, 0])
    return query, Nodes(key, value, position), slots, upcoming, depths, ancestors


def oracle(
    query,
    key,
    value,
    keys,
    values,
    positions,
    upcoming,
    depths,
    ancestors,
    sink=None,
    *,
    scale,
    cap=None,
):
    """Write each path into a copy of a head's slots, and attend in float64.

    The second result is the same mean of the values' magnitudes, the scale of errors.
    """
    query, key, value, keys, values = (
        np.asarray(x.astype("float32")).astype(np.float64)
        for x in (query, key, value, keys, values)
    )
    positions, upcoming, depths, ancestors = map(
        np.asarray, (positions, upcoming, depths, ancestors)
    )
    batch, nodes, heads, _ = query.shape
    kv_heads, slots = positions.shape[1:]
    group = heads // kv_heads
    out, magnitude = np.zeros((2, *query.shape))
    for b, t, k in itertools.product(range(batch), range(nodes), range(kv_heads)):
        held = {s: (keys[b, k, s], values[b, k, s]) for s in range(slots)}
        held = {s: x for s, x in held.items() if positions[b, k, s] >= 0}
        path = np.flatnonzero(ancestors[b, t])
        for node in path[np.argsort(depths[b, path])]:
            # A slot beyond the last one is one more place.
            held[upcoming[b, k, depths[b, node]]] = key[b, node, k], value[b, node, k]
        seen_keys, seen_values = map(np.stack, zip(*held.values(), strict=True))
        mine = slice(k * group, (k + 1) * group)
        logits = scale * query[b, t, mine] @ seen_keys.T
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
        own = np.full((group, 1), -np.inf)
        if sink is not None:
            own[:, 0] = np.asarray(sink, np.float32)[mine]
        top = np.maximum(logits.max(1, keepdims=True), own)
        weights = np.exp(logits - top)
        weights /= weights.sum(1, keepdims=True) + np.exp(own - top)
        out[b, t, mine] = weights @ seen_values
        magnitude[b, t, mine] = weights @ abs(seen_values)
    return out, magnitude


def check_attention(case, seed, mutate=lambda args: args) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it."""
    (args, _), dtype, head_dim = make_case(case, seed), case[5], case[4]
    rows, splits, block, apart, has_sink, cap = (*case[7:], *REST[len(case) :])
    tiles = Tiles(rows=rows, splits=splits, block=block, warps=4, stages=3, apart=apart)
    sink = jnp.linspace(-1, 4, case[1]).astype(dtype) if has_sink else None
    how = dict(scale=head_dim**-0.5, cap=cap)
    want, magnitude = oracle(*args, sink, **how)
    got = tree_triton.tree_attention_triton(
        *packed(mutate(args)), sink, **how, tiles=tiles
    )
    if (got.shape, got.dtype) != (args[0].shape, args[0].dtype):
        return [f"{case}: out is {got.dtype}{got.shape}"]
    error = np.abs(np.asarray(got.astype("float32")) - want) / magnitude
    if not error.max() <= TOLERANCE[dtype]:  # nor is it NaN
        return [f"{case}: out is off by {error.max():.3g} of its magnitude"]
    return []


def check_oracle() -> list[str]:
    """Compare the oracle with the float32 reference, which defines the operation."""
    args, _ = make_case((3, 2, 1, 20, 8, "float32", "random"), 0)
    reference = jax.jit(tree_attention._reference, static_argnames="scale")
    # The reference does not write a slot beyond the last one; it forgets the node.
    args = (*args[:6], args[6] % 20, *args[7:])
    want, _ = oracle(*args, scale=0.3)
    error = abs(want - reference(*packed(args), scale=0.3)).max()
    return [] if error < 5e-6 else [f"the oracle is off by {error:.3g}"]


def check_writing(case, seed) -> list[str]:
    """Write a path per row, and compare with one write after the other."""
    (_, key, value, *cache, upcoming, depths, _), parents = make_case(case, seed)
    batch = key.shape[0]
    path = np.zeros((batch, upcoming.shape[2] - 1), np.int32)
    count = np.zeros(batch, np.int32)
    for row in range(batch - 1):  # the last one writes nothing
        # To the deepest node; part of the way in one row.
        node = int(depths[row].argmax())
        count[row] = int(depths[row, node]) + (row != 1)
        for depth in range(int(depths[row, node]), -1, -1):
            path[row, depth], node = node, parents[row, node]
    nodes = Nodes(key, value, jnp.int32([90, 91, 92, -1]))
    slots = Slots(*cache, upcoming[:, :, 0])
    args = nodes, slots, jnp.asarray(path), upcoming, jnp.asarray(count)
    got = tree_triton.write_path_triton(*args)[:4]
    names = ("keys", "values", "positions", "target")
    failures = []
    for how in ("reference", "xla"):
        want = write_path(*args, implementation=how)[:4]
        for name, a, b in zip(names, got, want, strict=True):
            if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                failures.append(f"{case}: {name} differ from {how}")
    return failures


write_path = jax.jit(
    tree_write.write_path,
    static_argnames="implementation",
)

MUTATIONS = {  # index of the argument, and its change
    "values of slots": (4, lambda x: jnp.roll(x, 1, 2)),
    "values of nodes": (2, lambda x: jnp.roll(x, 1, 1)),
    "slots of the path": (6, lambda x: x + 1),
    "depths": (7, lambda x: jnp.maximum(x - 1, 0)),
    "ancestors": (8, lambda x: x | jnp.roll(x, 1, 2)),
}


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = []
    for i, case in enumerate(cases):
        failures += check_attention(case, i)
        if i < 2:
            failures += check_writing(case, i)
    if sys.argv[1] == "FAST":
        failures += check_oracle()
        for name, (index, change) in MUTATIONS.items():

            def mutate(args, index=index, change=change):
                return (*args[:index], change(args[index]), *args[index + 1 :])

            if not check_attention(FAST[1], 1, mutate):
                failures.append(f"{name}: a change went unnoticed")
        oracle = functools.partial(lambda run, *x, cap, **y: run(*x[:9], **y), oracle)
        for case in FAST[-2:]:
            if not check_attention(case, 3):
                failures.append(f"{case}: sink or cap: went unnoticed")
    print(json.dumps(failures))
