"""The Triton kernels without a GPU: interpreted against an oracle, and compiled.

Run as a script, this file is its own worker; `triton_on_cpu` says why.
"""

import itertools
import json
import sys
import types

import numpy as np
import pytest
import triton_on_cpu

from jaxkv.kernels.decode_triton import (
    Tiles,
    attend_constants,
    choose_tiles,
    combine_constants,
    combine_warps,
    newest_constants,
)
from jaxkv.kernels.triton_call import call, weighing

# heads, KV heads, slots, head size, dtype, tiles (splits, block)
FAST = [
    (2, 2, 37, 64, "float32", (1, 16)),
    (2, 2, 37, 64, "bfloat16", (2, 16)),
    (8, 2, 129, 128, "bfloat16", (2, 64)),
    (8, 2, 129, 128, "float16", (3, 32)),
    (8, 2, 100, 128, "float32", (5, 16)),
    (4, 1, 64, 96, "bfloat16", (1, 64)),
    (3, 1, 65, 96, "float32", (2, 32)),
    (16, 1, 77, 64, "float16", (2, 32)),
    (24, 1, 50, 64, "bfloat16", (2, 16)),
    (8, 2, 33, 256, "bfloat16", (2, 16)),
    (8, 2, 1, 64, "bfloat16", (1, 16)),
    (8, 2, 5, 64, "float32", (4, 16)),
]
SLOW = [
    (kv_heads * group, kv_heads, slots, head_dim, dtype, (splits, block))
    for (kv_heads, group), slots, head_dim, dtype, (splits, block) in itertools.product(
        [(3, 1), (2, 4), (1, 7)],
        [16, 63, 130],
        [64, 96, 128],
        ["float32", "bfloat16", "float16"],
        [(1, 32), (2, 16), (3, 64)],
    )
]
# Weights and output are rounded once each: two unit roundoffs of float16, and twice
# that in bfloat16, to which the interpreter truncates. In float32 it is the sums, the
# exponential and the scaled logits that count.
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-6, "float16": 2**-10}

# batch, KV heads, slots, head size, dtype: with the tiles that `choose_tiles` ships
SHIPPED = [
    (128, 8, 3200, 128, "bfloat16"),
    (64, 8, 16384, 128, "bfloat16"),
    (8, 8, 3200, 128, "bfloat16"),
    (1, 8, 3200, 128, "bfloat16"),
    (128, 8, 3200, 64, "bfloat16"),
    (1, 8, 3200, 64, "bfloat16"),
]
SHIPPED_SLOW = [
    *itertools.product([1, 128], [8], [3201], [64, 96, 128, 256], ["float16"]),
    *itertools.product([128], [8], [3200], [80, 96, 112], ["bfloat16"]),
    *itertools.product([1, 128], [8], [3200], [64, 128, 256], ["float32"]),
]


@triton_on_cpu.fast_and_slow
def test_interpreted_kernels_agree_with_the_oracle(cases):
    triton_on_cpu.assert_interpreted(__file__, cases)


@triton_on_cpu.compiled_for(SHIPPED, SHIPPED_SLOW)
def test_shipped_tiles_compile_without_spills(shape, capability, record_property):
    pytest.importorskip("triton")
    batch, kv_heads, slots, head_dim, dtype = shape
    tiles = choose_tiles(batch, kv_heads, slots, head_dim, dtype)
    constants = attend_constants(
        4 * kv_heads, kv_heads, slots, head_dim, dtype, 0.1, tiles
    )
    constants |= newest_constants(slots, tiles) | triton_on_cpu.PLAIN
    usage = compile_usage(
        "attend_split", dtype, tiles.parts == 1, constants, tiles, capability
    )
    for name, number in usage.items():
        record_property(name, number)
    print(f"sm_{capability} {shape} {tiles} {usage}")
    assert usage["stack"] == 0 and usage["local"] == 0
    # Room for two programs per processor on A100, for three on H100 with 4 warps.
    assert usage["shared"] <= 83 * 1024
    if tiles.parts > 1:
        constants = combine_constants(head_dim, tiles.parts)
        usage = compile_usage(
            "combine_splits", dtype, True, constants, tiles, capability
        )
        assert usage["stack"] == 0 and usage["local"] == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((128, 8, 3200, 128), Tiles(splits=15, block=64, warps=4, stages=3)),
        ((64, 8, 16384, 128), Tiles(splits=31, block=64, warps=4, stages=3)),
        ((8, 8, 3200, 128), Tiles(splits=15, block=64, warps=4, stages=3)),
        ((1, 8, 16384, 128), Tiles(splits=31, block=64, warps=4, stages=3)),
        ((1, 3, 1024, 64), Tiles(splits=2, block=128, warps=4, stages=3)),
        ((1, 3, 8192, 64), Tiles(splits=21, block=128, warps=4, stages=3)),
    ],
)
def test_chosen_tiles_are_the_measured_ones(shape, expected):
    assert choose_tiles(*shape, "bfloat16") == expected


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_splits_are_joined_by_a_power_of_two_of_warps(head_dim):
    for splits in range(1, 65):
        tiles = Tiles(splits=splits, block=16, warps=4, stages=2)
        assert combine_warps(combine_constants(head_dim, tiles.splits)) in (1, 2, 4)


@pytest.mark.parametrize("version", ["0.3", "0.4"])
def test_aliased_buffers_are_passed_as_each_jax_triton_expects(version, monkeypatch):
    def before(*args, kernel, out_shape, grid, input_output_aliases, name, **others):
        return args, out_shape, others

    def since(*args, kernel, out_type, grid, input_output_aliases, name, **others):
        return args, out_type, others

    triton_call = before if version == "0.3" else since
    fake = types.SimpleNamespace(triton_call=triton_call)
    monkeypatch.setitem(sys.modules, "jax_triton", fake)
    names = ["x_ptr", "y_ptr", "_x_out_ptr", "SIZE"]
    kernel = types.SimpleNamespace(arg_names=names, __name__="kernel")
    arrays, outs, constants = call(
        kernel, ("x",), ("y", "x"), aliases={0: 1}, grid=(1,), SIZE=3
    )
    assert (arrays, outs) == (("x",), ("y", "x"))
    new = {"_x_out_ptr": 0, "backend_options": {"enable_fp_fusion": True}}
    assert constants == ({"SIZE": 3} | (new if version == "0.4" else {}))


def test_chosen_tiles_are_possible_everywhere():
    for batch, kv_heads, slots, head_dim, dtype in itertools.product(
        [1, 7, 300], [1, 8], [1, 17, 3201], [64, 96, 128, 256], ["float32", "float16"]
    ):
        tiles = choose_tiles(batch, kv_heads, slots, head_dim, dtype)
        assert tiles.block >= 16 and tiles.block & (tiles.block - 1) == 0
        # No split without a tile.
        assert 1 <= tiles.splits <= -(-slots // tiles.block)


def compile_usage(kernel, dtype, writes_out, constants, tiles, capability):
    """Compile one kernel to machine code and read what it uses, without a GPU."""
    from jaxkv.kernels import decode_triton_body

    kernel = getattr(decode_triton_body, kernel)
    dtypes = dict.fromkeys(kernel.arg_names, dtype)
    dtypes |= dict.fromkeys(["positions_ptr", "target_ptr", "position_ptr"], "int32")
    dtypes |= dict.fromkeys(["parts_ptr", "statistic_ptr"], "float32")
    dtypes["out_ptr"] = dtype if writes_out else "float32"
    return triton_on_cpu.usage(kernel, dtypes, constants, tiles, capability)


def oracle(q, k_new, v_new, keys, values, positions, target, position, scale):
    """Attention in float64, one query head after the other, on a copy of the cache.

    The second result is the same mean of the values' magnitudes, the scale of errors.
    """
    keys, values, positions = keys.copy(), values.copy(), positions.copy()
    batch, heads, _ = q.shape
    group = heads // keys.shape[1]
    out, magnitude = np.zeros(q.shape), np.zeros(q.shape)
    for b in np.flatnonzero(position >= 0):
        for k in range(keys.shape[1]):
            keys[b, k, target[b, k]] = k_new[b, k]
            values[b, k, target[b, k]] = v_new[b, k]
            positions[b, k, target[b, k]] = position[b]
    for b, n in itertools.product(range(batch), range(heads)):
        occupied = positions[b, n // group] >= 0
        if occupied.any():
            logits = scale * keys[b, n // group, occupied] @ q[b, n]
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            out[b, n] = weights @ values[b, n // group, occupied]
            magnitude[b, n] = weights @ abs(values[b, n // group, occupied])
    return out, magnitude, keys, values, positions


def check_interpreted(case, seed, swap=False) -> list[str]:
    """Run one case under the interpreter and return what is wrong with it.

    `swap` passes values for keys and the other way round, which must be noticed.
    """
    import torch

    from jaxkv.kernels import decode_triton_body as body

    heads, kv_heads, slots, head_dim, dtype, (splits, block) = case
    tiles = Tiles(splits=splits, block=block, warps=4, stages=3)
    batch, scale = 5, head_dim**-0.5
    rng = np.random.default_rng(seed)

    def normal(*shape):
        array = rng.standard_normal(shape, dtype=np.float32)
        return torch.from_numpy(array).to(getattr(torch, dtype))

    q = normal(batch, heads, head_dim)
    k_new, v_new = normal(2, batch, kv_heads, head_dim)
    keys, values = normal(2, batch, kv_heads, slots, head_dim)
    # Ragged: row 0 full, row 1 a prefix, row 2 sparse, row 3 finished, row 4 empty.
    occupied = rng.random((batch, kv_heads, slots)) < 0.5
    occupied[0] = True
    occupied[1] = np.arange(slots) < rng.integers(0, slots + 1, (kv_heads, 1))
    occupied[4] = False
    order = rng.permuted(np.broadcast_to(np.arange(slots), occupied.shape), axis=-1)
    order[0] = np.arange(slots)  # where the newest tokens lie is guessed right
    positions = np.where(occupied, order, -1).astype(np.int32)
    keys[~torch.from_numpy(occupied)] = float("nan")
    values[~torch.from_numpy(occupied)] = float("nan")
    target = rng.integers(0, slots, (batch, kv_heads)).astype(np.int32)
    target[0, 0], target[1, 0] = slots - 1, 0
    target[3] = rng.choice([-1, slots, 2**31 - 1])  # means nothing in a finished row
    position = np.array([slots, slots, slots + 1, -1, 0], np.int32)

    def exact(tensor):
        return tensor.to(torch.float64).numpy()

    want_out, magnitude, *want_cache = oracle(
        *map(exact, (q, k_new, v_new, keys, values)), positions, target, position, scale
    )
    positions = torch.from_numpy(positions)
    dtype_out = q.dtype if tiles.parts == 1 else torch.float32
    parts = torch.full((tiles.parts, *q.shape), float("nan"), dtype=dtype_out)
    statistic = torch.full((tiles.parts, batch, heads), float("nan"))
    if swap:
        k_new, v_new, keys, values = v_new, k_new, values, keys
    body.attend_split[(batch * kv_heads, tiles.parts)](
        *(q, k_new, v_new, keys, values, positions),
        *(torch.from_numpy(target), torch.from_numpy(position), 1, parts, statistic),
        *(keys, values, positions),
        **attend_constants(heads, kv_heads, slots, head_dim, dtype, scale, tiles),
        **newest_constants(slots, tiles) | weighing(None, None),
    )
    out = parts[0]
    if tiles.parts > 1:
        out = torch.full_like(q, float("nan"))
        body.combine_splits[(batch * heads,)](
            parts, statistic, out, **combine_constants(head_dim, tiles.parts)
        )
    failures = []
    error = np.abs((exact(out) - want_out) / np.maximum(magnitude, 1e-9))
    error = np.where((position >= 0)[:, None, None], error, 0 * exact(out)).max()
    if not error <= TOLERANCE[dtype]:
        failures.append(f"{case}: out is off by {error:.3g} of its magnitude")
    got_cache = exact(keys), exact(values), positions.numpy()
    names = ["keys", "values", "positions"]
    for name, got, want in zip(names, got_cache, want_cache, strict=True):
        if not np.array_equal(got, want, equal_nan=name != "positions"):
            failures.append(f"{case}: {name} differ")
    return failures


if __name__ == "__main__":
    triton_on_cpu.teach_bfloat16_dot()
    cases = {"FAST": FAST, "SLOW": SLOW}[sys.argv[1]]
    failures = [f for i, case in enumerate(cases) for f in check_interpreted(case, i)]
    if not any("out is off" in f for f in check_interpreted(cases[0], 0, swap=True)):
        failures.append("swapping keys and values went unnoticed")
    print(json.dumps(failures))
