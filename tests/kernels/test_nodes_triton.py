"""Drafted tokens have the bits of plain decoding: interpreted, compiled, on a GPU.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels import decode_triton, nodes_triton, tree_attention, triton_call
from jaxkv.kernels.cache import Nodes, Slots, Token
from jaxkv.kernels.decode_triton import Tiles, choose_tiles

# nodes, heads, KV heads, slots, head size, dtype, kind of cache, splits, block
CASES = [
    (5, 4, 2, 120, 64, "bfloat16", "append", 2, 32),
    (6, 3, 1, 100, 96, "float16", "ring", 3, 16),
    (4, 8, 1, 120, 64, "bfloat16", "append", 1, 64),
]
SCALE = 0.2
# batch, nodes, heads, KV heads, slots, head size: as shipped
SHIPPED = [
    (1, 11, 32, 8, 3200, 128),
    (1, 64, 32, 8, 3200, 128),
    (4, 11, 9, 3, 1024, 64),
    (2, 4, 4, 2, 100, 8),
]


def make_case(case, seed, batch=2):
    """Return the arguments of `tree_attention`, and parents `[B, T]`."""
    nodes, heads, kv_heads, slots, head_dim, dtype, kind, *_ = case
    rng = np.random.default_rng(seed)
    parents = np.zeros((batch, nodes), np.int32)
    depths = np.zeros((batch, nodes), np.int32)
    ancestors = np.zeros((batch, nodes, nodes), bool)
    for b, t in itertools.product(range(batch), range(nodes)):
        # The first row has a chain, the others have trees.
        parent = t - 1 if b == 0 else int(rng.integers(max(0, t - 4), max(1, t)))
        if t:
            parents[b, t], depths[b, t] = parent, depths[b, parent] + 1
            ancestors[b, t] = ancestors[b, parent]
        ancestors[b, t, t] = True

    def normal(*sizes):
        array = rng.standard_normal((batch, *sizes, head_dim), dtype=np.float32)
        return jnp.asarray(array, dtype)

    steps = np.arange(depths.max() + 2)
    length = rng.integers(2 * slots // 3, slots - nodes, batch).astype(np.int32)
    positions = np.full((batch, kv_heads, slots), -1, np.int32)
    upcoming = np.zeros((batch, kv_heads, len(steps)), np.int32)
    root = length.copy()
    for b in range(batch):
        if kind == "append":
            positions[b, :, : length[b]] = np.arange(length[b])
            upcoming[b] = length[b] + steps
        else:  # two sinks, then a circle that has gone round
            root[b] = 3 * slots + length[b]
            circle = slots - 2
            for position in range(root[b]):
                slot = position if position < 2 else 2 + (position - 2) % circle
                positions[b, :, slot] = position
            upcoming[b] = 2 + (root[b] - 2 + steps) % circle
    free = jnp.asarray(np.where(positions < 0, np.nan, 0)[..., None], dtype)
    drafts = Nodes(normal(nodes, kv_heads), normal(nodes, kv_heads), jnp.asarray(root))
    held = Slots(
        *(normal(kv_heads, slots) + free, normal(kv_heads, slots) + free),
        *map(jnp.asarray, (positions, upcoming[:, :, 0])),
    )
    arguments = map(jnp.asarray, (upcoming, depths, ancestors))
    return (normal(nodes, heads), drafts, held, *arguments), parents


def one_by_one(arguments, parents):
    """Return what plain decoding asks at every node, as a batch of `B * T` rows."""
    query, drafts, slots, upcoming, depths, _ = arguments
    batch, nodes = depths.shape
    keys, values, positions = (np.array(x) for x in slots[:3])
    new_keys, new_values, root = map(np.asarray, drafts)
    upcoming, depths = np.asarray(upcoming), np.asarray(depths)
    rows = []
    for b, t in itertools.product(range(batch), range(nodes)):
        k, v, p = keys[b].copy(), values[b].copy(), positions[b].copy()
        path, node = [], t
        while node:
            node = int(parents[b, node])
            path.insert(0, node)
        for node in path:
            d = int(depths[b, node])
            for head, at in enumerate(upcoming[b, :, d]):
                k[head, at] = new_keys[b, node, head]
                v[head, at] = new_values[b, node, head]
                p[head, at] = root[b] + d
        d = depths[b, t]
        rows.append((k, v, p, upcoming[b, :, d], root[b] + d))
    k, v, p, target, position = (
        jnp.asarray(np.stack(x)) for x in zip(*rows, strict=True)
    )

    def flat(x):
        return x.reshape(batch * nodes, *x.shape[2:])

    token = Token(flat(drafts.key), flat(drafts.value), position)
    return flat(query), token, Slots(k, v, p, target)


def check_bits(
    case, seed, tiles=None, change=lambda arguments: arguments, weighs=False
) -> list[str]:
    """Compare a tree's output with plain decoding's, bit for bit.

    With `weighs` both have sinks and a cap.
    """
    arguments, parents = make_case(case, seed)
    sink = jnp.linspace(-1, 4, case[1]).astype(case[5]) if weighs else None
    how = dict(sink=sink, cap=1.5 if weighs else None, scale=SCALE, tiles=tiles)
    want, _ = decode_triton.decode_attention_triton(
        *one_by_one(arguments, parents), **how
    )
    got = nodes_triton.attend_nodes_triton(*change(arguments), **how)
    got = got.reshape(want.shape)
    if got.dtype != want.dtype or not np.isfinite(np.asarray(got, np.float32)).all():
        return [f"{case}: {got.dtype}, or not finite"]
    differ = (np.asarray(got) != np.asarray(want)).any((-1, -2))
    if differ.any():
        return [f"{case}: other bits at nodes {np.flatnonzero(differ).tolist()}"]
    return []


def check_tree(case, seed, tiles=None) -> list[str]:
    """Compare a tree's output with the reference's."""
    arguments, _ = make_case(case, seed)
    got = nodes_triton.attend_nodes_triton(*arguments, scale=SCALE, tiles=tiles)
    want = reference(*arguments, scale=SCALE)
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32)).max()
    return [] if error < 2**-5 else [f"{case}: off by {error}"]


reference = jax.jit(tree_attention._xla, static_argnames="scale")


def check_rows(counts, heads=(2, 1), slots=100) -> list[str]:
    """Compare rows of a batch with the same rows alone, bit for bit."""
    failures = []
    case = (32, *heads, slots, 64, "bfloat16", "append")
    arguments, parents = make_case(case, 0)
    query, token, slots = one_by_one(arguments, parents)
    batch = len(query)

    def run(rows):
        taken = jax.tree.map(lambda x: x[rows], (query, token, slots))
        out, _ = decode_triton.decode_attention_triton(*taken, scale=SCALE)
        return np.asarray(out)

    row = batch - 1
    alone = run(np.array([row]))
    for count in counts:
        if not np.array_equal(run(np.arange(batch - count, batch))[-1:], alone):
            failures.append(f"other bits in a batch of {count}")
    return failures


def test_interpreted_drafts_have_the_bits_of_plain_decoding():
    triton_on_cpu.assert_interpreted(__file__, "")


@pytest.mark.parametrize("slots", [16, 700, 3200, 20000])
def test_how_slots_are_shared_out_does_not_depend_on_the_batch(slots):
    for kv_heads, head_dim in [(8, 128), (3, 64), (1, 256)]:
        sizes = kv_heads, slots, head_dim, "bfloat16"
        alone = choose_tiles(1, *sizes)
        for batch in (2, 7, 8, 33, 64, 500):
            tiles = choose_tiles(batch, *sizes)
            # More warps do the same sums.
            assert dataclasses.replace(tiles, warps=alone.warps) == alone


def test_the_rows_of_a_tile_are_those_of_one_instruction():
    for group, nodes in itertools.product([1, 3, 4, 8, 16, 32], [1, 5, 64]):
        tiles = choose_tiles(nodes, 2, 3200, 128, "bfloat16")
        keys = jax.ShapeDtypeStruct((1, 2, 3200, 128), jnp.bfloat16)
        constants = nodes_triton.attend_constants(
            *((1, nodes, 2 * group, 128), (1, 2, 4), keys, 0.1, tiles)
        )
        assert constants["ROWS"] in (16, 32)
        assert constants["GROUP_PAD"] in (16, 32)
        assert 1 <= constants["AT_ONCE"] * group <= constants["ROWS"]


def test_paths_name_the_nodes_above():
    depths = jnp.int32([[0, 1, 1, 2]])
    above = np.eye(4, dtype=bool)
    above[1:, 0] = above[3, 2] = True
    got = np.asarray(nodes_triton.paths(depths, jnp.asarray(above[None])))[0]
    assert got[:, :3].tolist() == [[0, -1, -1], [1, 0, -1], [2, 0, -1], [3, 2, 0]]
    assert (got[:, 3:] == -1).all()


@triton_on_cpu.compiled_for(SHIPPED[:1], SHIPPED[1:])
def test_shipped_tiles_compile_without_spills(shape, capability):
    pytest.importorskip("triton")
    from jaxkv.kernels import nodes_triton_body as body

    batch, nodes, heads, kv_heads, slots, head_dim = shape
    sizes = kv_heads, slots, head_dim, "bfloat16"
    tiles = nodes_triton.choose_tiles(batch, *sizes)
    keys = jax.ShapeDtypeStruct((batch, kv_heads, slots, head_dim), jnp.bfloat16)
    constants = nodes_triton.attend_constants(
        *((batch, nodes, heads, head_dim), (batch, kv_heads, 12), keys, 0.1, tiles)
    )
    dtypes = dict.fromkeys(body.attend_nodes.arg_names, "int32")
    arrays = ("query", "key", "value", "keys", "values")
    dtypes |= {f"{name}_ptr": "bfloat16" for name in arrays}
    dtypes |= dict(statistic_ptr="float32", out_ptr="float32")
    constants |= triton_on_cpu.PLAIN
    usage = triton_on_cpu.usage(body.attend_nodes, dtypes, constants, tiles, capability)
    print(f"sm_{capability} {shape} {tiles} {usage}")
    assert usage["stack"] == 0 and usage["local"] == 0
    assert usage["shared"] <= 99 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["append", "ring"])
@pytest.mark.parametrize("shape", SHIPPED)
def test_on_a_gpu_drafts_have_the_bits_of_plain_decoding(shape, kind):
    _, nodes, heads, kv_heads, slots, head_dim = shape
    case = (nodes, heads, kv_heads, slots, head_dim, "bfloat16", kind)
    failures = check_bits(case, 0) + check_bits(case, 0, weighs=True)
    assert not failures, "\n".join(failures)


@pytest.mark.gpu
def test_on_a_gpu_a_row_has_the_bits_that_it_has_alone():
    failures = check_rows([1, 2, 7, 8, 33, 64], (32, 8), 1000)
    assert not failures, "\n".join(failures)


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    triton_call.call = triton_on_cpu.call
    failures = []
    for seed, case in enumerate(CASES):
        tiles = Tiles(splits=case[7], block=case[8], warps=4, stages=3)
        failures += check_bits(case, seed, tiles)
        if seed < 2:
            failures += check_tree(case, seed, tiles)
        else:
            failures += check_bits(case, seed, tiles, weighs=True)
    failures += check_rows([7, 33])

    def deeper(arguments):
        return (*arguments[:4], arguments[4] + 1, arguments[5])

    if not check_bits(CASES[0], 0, tiles, deeper):
        failures.append("other depths went unnoticed")
    print(json.dumps(failures))
